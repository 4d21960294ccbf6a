"""``bdlora launch --dry-run``: what each GPU would hold, and what would be left."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from bdlora_sglang.serving.options import ServingOptions

if TYPE_CHECKING:  # it imports torch, which takes a second
    from bdlora_sglang.adapter.locate import NamedAdapter

_GIB = 2**30
# Where none is given. SGLang works it out from the GPU that it finds.
_ASSUMED_FRACTION = 0.85


def print_memory_plan(
    model_path: str,
    tp: int | None,
    adapters: "Sequence[NamedAdapter]",
    sglang_flags: Sequence[str],
    options: ServingOptions,
    gpu_gib: float | None,
) -> None:
    """Print it for GPUs of ``gpu_gib`` GiB, by default like this machine's; raises `BDLoRAError` as a start does."""
    import torch

    if gpu_gib is None and torch.cuda.is_available():
        gpu_gib = torch.cuda.get_device_properties(0).total_memory / _GIB
    # Before SGLang is imported: it builds models for the devices that it finds then, and here it needs none.
    os.environ.update({"SGLANG_PLATFORM": "bdlora_cpu", "CUDA_VISIBLE_DEVICES": ""})
    from bdlora_sglang.serving.dry_run import plan_memory
    from bdlora_sglang.serving.launch import given_arguments, server_args
    from bdlora_sglang.serving.report import adapter_table
    from bdlora_sglang.serving.sizes import format_bytes

    given = given_arguments(["--model-path", model_path, *sglang_flags])
    plan = plan_memory(server_args(model_path, tp, adapters, sglang_flags, options.lora_sharding), options)
    console = Console(soft_wrap=True)
    if plan.adapters:
        console.print(adapter_table(plan.adapters, plan.tp_size))
    console.print(
        f"On each of {plan.tp_size} GPUs: {format_bytes(plan.weight_bytes)} of weights, and {plan.num_slots} slots of "
        f"{format_bytes(plan.slot_bytes)}: {format_bytes(plan.pool_bytes)} ({plan.pool_bytes} bytes), and "
        f"{format_bytes(plan.scratch_bytes)} of scratch for batches of {plan.batch_tokens} tokens."
    )
    if plan.kv_token_bytes is None:
        console.print("KV cache: not worked out for this model's kind of attention.")
        return
    console.print(f"KV cache: {format_bytes(plan.kv_token_bytes)} a token.")
    if gpu_gib is None:
        console.print("No GPU here: --gpu-memory GiB says what would be left of one.")
        return
    fraction = given.get("mem_fraction_static", _ASSUMED_FRACTION)
    budget = gpu_gib * _GIB * fraction
    assumed = "" if "mem_fraction_static" in given else " (assumed)"
    tokens = plan.kv_tokens(budget)
    console.print(
        f"Of {gpu_gib:.0f} GiB at --mem-fraction-static {fraction}{assumed}: {tokens} tokens of KV cache. With half as "
        f"many, {plan.slots_that_fit(budget, tokens // 2)} slots would fit."
    )
