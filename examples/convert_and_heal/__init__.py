"""Convert a LoRA to BD-LoRA, see what it costs, and train it a little further."""
