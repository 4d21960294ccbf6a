"""Estimates of LoRA serving under tensor parallelism: a roofline for each GPU, alpha and beta for each collective.

Nothing here is measured, and no constant was fitted to the figures that the estimate is compared with
(`bdlora_perf.estimate.paper`). Every constant carries its source.
"""
