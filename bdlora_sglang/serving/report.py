"""The table that a server prints when its adapters are in place."""

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.runtime_context import get_parallel

from bdlora_sglang.serving.local_adapter import LocalAdapter
from bdlora_sglang.serving.scheduler import prove_in_place
from bdlora_sglang.serving.sizes import format_bytes


def print_adapters(model_runner: ModelRunner) -> None:
    """Print one row an adapter, and what the memory pool takes, as this rank has them."""
    manager = model_runner.lora_manager
    tp_size = get_parallel().tp_size
    num_layers = prove_in_place(model_runner)
    pool = manager.memory_pool
    console = Console()
    if manager.loras:
        console.print(adapter_table(manager.loras.values(), tp_size))
    console.print(
        f"BD-LoRA is in place: {num_layers} layers, {pool.max_loras_per_batch} slots of "
        f"{format_bytes(pool.slots.slot_bytes)} per GPU, {manager.sharding.description}.",
        soft_wrap=True,
    )


def adapter_table(adapters: Iterable[LocalAdapter], tp_size: int) -> Table:
    table = Table(title=f"Adapters at TP {tp_size}")
    for column in ("adapter", "kind"):
        table.add_column(column)
    for column in ("blocks", "rank", "local rank", "per GPU"):
        table.add_column(column, justify="right")
    for lora in adapters:
        plan = lora.plan
        table.add_row(
            plan.name, plan.kind, str(plan.nblocks), str(plan.rank), str(plan.local_rank), format_bytes(lora.num_bytes)
        )
    return table
