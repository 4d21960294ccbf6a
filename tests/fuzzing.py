"""How many examples a fuzz test takes, and which."""

import os

from hypothesis import HealthCheck, settings

# By hand: BDLORA_FUZZ_EXAMPLES=5000, each time other ones.
_EXAMPLES = os.environ.get("BDLORA_FUZZ_EXAMPLES")


def fuzz_settings(examples: int) -> settings:
    """``examples``, always the same ones, unless others are asked for by hand."""
    return settings(
        max_examples=int(_EXAMPLES or examples),
        derandomize=_EXAMPLES is None,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
