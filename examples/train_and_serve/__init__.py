"""Train a BD-LoRA adapter for a TP degree."""
