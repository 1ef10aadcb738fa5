"""The training loop and its parts: recipe, measurement, checkpoints and plots."""
