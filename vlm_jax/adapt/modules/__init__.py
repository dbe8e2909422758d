"""Modules inserted beside a model's own: each method makes a `Recipe` from the model."""
