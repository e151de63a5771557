"""The proof that what is served is what was trained: the same prompts, token by token, and the same probabilities."""
