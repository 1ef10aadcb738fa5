"""The training loop and what it needs: recipe, measurement, checkpoints, the record."""
