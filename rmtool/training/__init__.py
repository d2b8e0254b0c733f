"""One training process: steps, engine, checkpoints, metrics and status."""
