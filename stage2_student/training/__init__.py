"""Training: objectives, losses, phases, trainer, checkpoints."""
