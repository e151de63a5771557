"""Conversations as a model's own chat template shows them: their text, their trained turns, and how they are served."""
