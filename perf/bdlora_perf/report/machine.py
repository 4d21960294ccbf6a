"""What this machine is, for the head of a report."""

import os
import platform
import re
from importlib.metadata import distributions
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from bdlora_perf.report.schema import Machine

_PACKAGES = ("bdlora-sglang", "sglang", "torch", "triton", "transformers", "peft", "flashinfer-python", "numpy")


def describe_machine() -> "Machine":
    """Hardware and versions of what runs here; no names of hosts or users."""
    from bdlora_perf.report.schema import Machine

    return Machine.model_validate(machine_facts())


def machine_facts() -> dict[str, Any]:
    """The fields of a `Machine`, for raw figures that a report is made of elsewhere; needs PyTorch alone."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "memory_gib": round(memory / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": {name: found.version for name in _PACKAGES for found in islice(distributions(name=name), 1)},
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else ""
    named = re.search("^model name[ \t]*:(.*)", text, re.MULTILINE)
    return named[1].strip() if named else platform.processor() or platform.machine()
