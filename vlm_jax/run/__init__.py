"""A run: its program, checkpoints, processes, throughput and metrics."""
