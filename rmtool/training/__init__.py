"""One process's steps: the trainer, the engine around the model, metrics, status."""
