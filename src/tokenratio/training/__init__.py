"""Training: the trainer, its settings, the reference model and the state baseline."""
