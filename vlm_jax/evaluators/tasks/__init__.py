"""One evaluator a file: its arguments, its rows of a batch, its result."""
