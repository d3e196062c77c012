"""How a model learns: recipes, the Trainer, checkpoints, the linear probe."""
