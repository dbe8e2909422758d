"""Tuning of the whole model or a tower, held by what the base model knows: each method makes a `Recipe`."""
