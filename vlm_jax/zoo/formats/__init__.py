"""Key maps: one module for each project whose checkpoints are read and written."""
