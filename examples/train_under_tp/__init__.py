"""Train a BD-LoRA adapter under tensor parallelism, without a collective for LoRA."""
