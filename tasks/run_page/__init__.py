"""The page of a run as one HTML file that needs nothing beside it: facts from the store, pictures, a template."""
