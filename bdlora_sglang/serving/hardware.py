"""Settings that follow from the machine: a GPU, or the CPU platform where there is none."""

import os

import torch

from bdlora_sglang.serving.cpu.cores import choose_binding
from bdlora_sglang.serving.options import LoRASharding

# Named here, not in platform.py: SGLang imports that file itself, in the midst of its own import.
PLATFORM_NAME = "bdlora_cpu"
ATTENTION_BACKEND = "bdlora_cpu"

_HUGE_PAGES = "glibc.malloc.hugetlb"

_NO_CUDA_GRAPHS: dict[str, object] = {"cuda_graph_backend_decode": "disabled", "cuda_graph_backend_prefill": "disabled"}


def has_accelerator() -> bool:
    """Whether SGLang would find a device other than the CPU, or the user chose a platform by hand."""
    chosen = os.environ.get("SGLANG_PLATFORM")
    if chosen is not None and chosen != PLATFORM_NAME:
        return True
    return chosen is None and torch.accelerator.is_available()


def on_cpu_platform() -> bool:
    """Whether our CPU platform was chosen, here or in the process that started this one."""
    return os.environ.get("SGLANG_PLATFORM") == PLATFORM_NAME


def use_cpu_platform(num_ranks: int) -> None:
    """Choose the CPU platform for this process and its children; ``num_ranks`` of them share this machine's cores."""
    from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES, add_attention_backend_choices

    os.environ["SGLANG_PLATFORM"] = PLATFORM_NAME
    if ATTENTION_BACKEND not in ATTENTION_BACKEND_CHOICES:
        add_attention_backend_choices([ATTENTION_BACKEND])
    choose_binding(num_ranks)
    _ask_for_huge_pages()


def _ask_for_huge_pages() -> None:
    """For processes that start after this: products with large weights take a sixth less time in pages of 2 MiB.

    glibc then advises the kernel so; what the user has set of it stays.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if _HUGE_PAGES not in tunables:
        os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (tunables, f"{_HUGE_PAGES}=1")))


def cpu_defaults() -> dict[str, object]:
    """SGLang server arguments for the CPU platform, by their names in ``ServerArgs``."""
    return {
        "device": "cpu",
        "attention_backend": ATTENTION_BACKEND,
        "sampling_backend": "pytorch",
        "grammar_backend": "xgrammar",
        **_NO_CUDA_GRAPHS,
        # SGLang would size the KV cache by the whole memory of the machine, on every rank.
        "mem_fraction_static": 0.2,
        "max_total_tokens": 16384,
        # A CPU has nothing to overlap with: each request would only cost a step more, whose token nobody wants.
        "disable_overlap_schedule": True,
        # The ranks would poll for requests on the very cores that the clients need.
        "sleep_on_idle": True,
    }


def gpu_defaults(lora_sharding: LoRASharding) -> dict[str, object]:
    """SGLang server arguments for a GPU: SGLang's own, but for graphs where ours are the kernels that have none."""
    captured = torch.cuda.is_available()
    return {} if captured or lora_sharding is LoRASharding.SGLANG else dict(_NO_CUDA_GRAPHS)
