"""Imported once by the process that every run of the load generator is forked from. SGLang warns of what is no GPU."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import sglang.benchmark.serving  # noqa: F401
