"""Learned tokens, keys and values; each method makes a `Recipe` from the model."""
