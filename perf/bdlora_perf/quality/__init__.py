"""``bdlora perf quality``: what LoRA, BD-LoRA and conversions learn from the same data, at equal parameters."""
