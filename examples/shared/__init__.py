"""What the examples have in common: the base model, the data, a training loop."""
