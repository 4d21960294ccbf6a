"""Settings that follow from the machine: a GPU, or the CPU platform where there is none."""

import os

import torch

from bdlora_sglang.serving.options import LoRASharding

# Named here, not in platform.py: SGLang imports that file itself, in the midst of its own import.
PLATFORM_NAME = "bdlora_cpu"

_NO_CUDA_GRAPHS: dict[str, object] = {"cuda_graph_backend_decode": "disabled", "cuda_graph_backend_prefill": "disabled"}

_BINDING = "SGLANG_CPU_OMP_THREADS_BIND"
_chosen_binding: str | None = None


def has_accelerator() -> bool:
    """Whether SGLang would find a device other than the CPU, or the user chose a platform by hand."""
    chosen = os.environ.get("SGLANG_PLATFORM")
    if chosen is not None and chosen != PLATFORM_NAME:
        return True
    return chosen is None and torch.accelerator.is_available()


def use_cpu_platform(num_ranks: int) -> None:
    """Choose the CPU platform for this process and its children, and give each rank its cores."""
    global _chosen_binding
    os.environ["SGLANG_PLATFORM"] = PLATFORM_NAME
    # The user's binding stays; ours was for the engine before this one, which may have had other ranks.
    if os.environ.get(_BINDING, _chosen_binding) == _chosen_binding:
        _chosen_binding = bind_cores(sorted(os.sched_getaffinity(0)), num_ranks)
        os.environ[_BINDING] = _chosen_binding


def bind_cores(cores: list[int], num_ranks: int) -> str:
    """SGLang's ``SGLANG_CPU_OMP_THREADS_BIND``: cores of rank 0 | cores of rank 1 | ...; ranks share few cores."""
    share = max(1, len(cores) // num_ranks)
    groups = ([cores[(rank * share + i) % len(cores)] for i in range(share)] for rank in range(num_ranks))
    return "|".join(",".join(map(str, group)) for group in groups)


def cpu_defaults() -> dict[str, object]:
    """SGLang server arguments for the CPU platform, by their names in ``ServerArgs``."""
    return {
        "device": "cpu",
        "attention_backend": "torch_native",
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        **_NO_CUDA_GRAPHS,
        # SGLang would size the KV cache by the whole memory of the machine, on every rank.
        "mem_fraction_static": 0.2,
        "max_total_tokens": 16384,
        # The ranks would poll for requests on the very cores that the clients need.
        "sleep_on_idle": True,
    }


def gpu_defaults(lora_sharding: LoRASharding) -> dict[str, object]:
    """SGLang server arguments for a GPU: SGLang's own, but for graphs that our kernels cannot be captured in."""
    captured = lora_sharding is LoRASharding.COMMUNICATION_FREE and torch.cuda.is_available()
    return {} if captured or lora_sharding is LoRASharding.SGLANG else dict(_NO_CUDA_GRAPHS)
