"""The table that a server prints when its adapters are in place."""

from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.table import Table
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.runtime_context import get_lora, get_parallel

from bdlora_sglang.serving.local_adapter import LocalAdapter
from bdlora_sglang.serving.manager import BDLoRAManager
from bdlora_sglang.serving.scheduler import prove_in_place
from bdlora_sglang.serving.sizes import format_bytes

# Below this part of a slot in use, it is said.
_MOSTLY_UNUSED = 0.5


def print_adapters(model_runner: ModelRunner) -> None:
    """Print one row an adapter, and what the memory pool takes, as this rank has them."""
    manager = model_runner.lora_manager
    tp_size = get_parallel().tp_size
    num_layers = prove_in_place(model_runner)
    console = Console()
    if manager.loras:
        console.print(adapter_table(manager.loras.values(), tp_size))
    for line in memory_lines(manager, num_layers, model_runner.max_total_num_tokens):
        console.print(line, soft_wrap=True)


def memory_lines(manager: BDLoRAManager, num_layers: int, kv_tokens: int) -> Iterator[str]:
    """What the slots take on this GPU, what that leaves, and what of it is never used by the adapters given."""
    pool = manager.memory_pool
    count, slot = pool.max_loras_per_batch, pool.slots.slot_bytes
    yield (
        f"BD-LoRA is in place: {num_layers} layers, {count} slots of {format_bytes(slot)} per GPU "
        f"({format_bytes(count * slot)}), {format_bytes(manager.scratch_bytes)} of scratch, "
        f"{manager.sharding.description}, {manager.kernels.description}. KV cache: {kv_tokens} tokens."
    )
    used = manager.used_part_of_slot()
    if 0 < used <= _MOSTLY_UNUSED:
        yield (
            f"The adapters given fill {format_bytes(used * slot)} of a slot, {used:.0%}. Slots made for them (neither "
            f"--max-local-rank nor --max-lora-rank) would be {int(count / used)} in the same memory."
        )
    if get_lora().max_loaded_loras is None:
        largest = max((lora.host_bytes for lora in manager.loras.values()), default=slot)
        yield (
            f"Host memory: each loaded adapter keeps up to {format_bytes(max(largest, 1))} per GPU"
            f"{' (pinned)' if manager.device.type != 'cpu' else ''} until it is unloaded, without a limit on their "
            "number; --max-loaded-loras sets one."
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
