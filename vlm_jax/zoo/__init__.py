"""Released checkpoints of other projects, in and out: `load`, `save`, one key map per format."""
