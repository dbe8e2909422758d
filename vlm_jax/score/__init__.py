"""The command `vlm-jax score`: the evaluator `pair_scores` on a data set to train on."""
