"""LoRA to BD-LoRA and back: exact where it can be, the best approximation else. No SGLang and no GPU needed.

Example::

    from bdlora_sglang.convert import ConvertOptions, RankChoice, lora2bd

    report = lora2bd("my-lora", "my-bdlora", ConvertOptions(nblocks=8, choice=RankChoice(param_ratio=0.87)))
    print(report.param_ratio, report.error)
"""

from bdlora_sglang.convert.api import bd2lora, lora2bd, reblock
from bdlora_sglang.convert.batch import Job, Outcome, Result, convert_all, find_adapters
from bdlora_sglang.convert.inspection import (
    AdapterSummary,
    BytesPerGPU,
    inspect_adapter,
)
from bdlora_sglang.convert.options import Calibration, ConvertOptions, RankChoice
from bdlora_sglang.convert.report import ConversionReport, ModuleReport
from bdlora_sglang.convert.sides import SIDES, TPSide
from bdlora_sglang.convert.verify import (
    DeltaDifference,
    LogprobDifference,
    compare_deltas,
    compare_logprobs,
)

__all__ = [
    "SIDES",
    "AdapterSummary",
    "BytesPerGPU",
    "Calibration",
    "ConversionReport",
    "ConvertOptions",
    "DeltaDifference",
    "Job",
    "LogprobDifference",
    "ModuleReport",
    "Outcome",
    "RankChoice",
    "Result",
    "TPSide",
    "bd2lora",
    "compare_deltas",
    "compare_logprobs",
    "convert_all",
    "find_adapters",
    "inspect_adapter",
    "lora2bd",
    "reblock",
]
