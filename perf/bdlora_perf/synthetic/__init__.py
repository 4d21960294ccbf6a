"""What tests, demos and benchmarks make for themselves: random models and adapters, PEFT's answers to compare with."""

from bdlora_perf.synthetic.adapters import (
    ALL_MODULES,
    ATTENTION_MODULES,
    BD_A_MODULES,
    BD_B_MODULES,
    MLP_MODULES,
    make_adapter,
)
from bdlora_perf.synthetic.models import ARCHITECTURES, make_model

__all__ = [
    "ALL_MODULES",
    "ARCHITECTURES",
    "ATTENTION_MODULES",
    "BD_A_MODULES",
    "BD_B_MODULES",
    "MLP_MODULES",
    "make_adapter",
    "make_model",
]
