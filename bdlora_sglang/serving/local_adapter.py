"""One adapter's part on this rank, in host memory: exactly what a slot of the memory pool will hold."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from bdlora_kernels import HostBlock, LayerPlan, PackedAdapter, pack_adapter
from bdlora_sglang.adapter import Adapter, LoRAModule
from bdlora_sglang.serving.find_modules import find_modules
from bdlora_sglang.serving.module_parts import ServedModule
from bdlora_sglang.serving.served_modules import ServedModules
from bdlora_sglang.serving.sharding import Sharding


@dataclass(frozen=True)
class AdapterPlan:
    """What this rank will read of an adapter, by SGLang layer name, and what the start-up table says of it.

    ``local_rank`` is the largest rank, over all modules, that this GPU holds. ``targets`` are the SGLang layers that
    the adapter touches on any rank; ``layers`` holds those that it touches on this one. ``unused`` are tensors that do
    not matter, each with the reason.
    """

    name: str
    kind: str
    nblocks: int
    rank: int
    local_rank: int
    targets: frozenset[str]
    layers: Mapping[str, LayerPlan]
    unused: Mapping[str, str]


@dataclass(frozen=True)
class LocalAdapter:
    """A plan and the factors that were read by it."""

    plan: AdapterPlan
    bytes_read: int
    packed: PackedAdapter

    @property
    def num_bytes(self) -> int:
        """Of the factors on this rank."""
        return self.packed.num_bytes

    @property
    def host_bytes(self) -> int:
        """Of host memory on this rank."""
        return self.packed.num_bytes + self.packed.block.table_F.nbytes


def plan_adapter(
    name: str, adapter: Adapter, served: ServedModules, sharding: Sharding, dtype: torch.dtype
) -> AdapterPlan:
    """Find this rank's part of ``adapter``, without reading it.

    Raises:
        AdapterError: a module that the base model does not have or with other dimensions, or which is not served.
    """
    found, foreign = find_modules(adapter, served)
    by_layer: dict[str, list[tuple[LoRAModule, ServedModule]]] = {}
    for module, parts in found:
        for part in parts:
            by_layer.setdefault(part.layer, []).append((module, part))
    layers: dict[str, LayerPlan] = {}
    local_rank = 0
    for layer, modules in sorted(by_layer.items()):
        local = sharding.plan(adapter, sorted(modules, key=lambda both: both[1].shard.output_offset), dtype)
        if local is not None:
            layers[layer] = local.layer
            local_rank = max(local_rank, local.rank)
    return AdapterPlan(
        name=name,
        kind=adapter.kind,
        nblocks=adapter.nblocks,
        rank=adapter.max_rank,
        local_rank=local_rank,
        targets=frozenset(by_layer),
        layers=layers,
        unused={**adapter.ignored, **foreign},
    )


def read_adapter(plan: AdapterPlan, adapter: Adapter, allocate: Callable[[int], HostBlock]) -> LocalAdapter:
    """Read this rank's part into a block that ``allocate`` makes for so many elements.

    Raises:
        AdapterError: NaN, infinity, or a value too large for the model's type.
    """
    packed = pack_adapter(plan.layers, allocate)
    return LocalAdapter(plan, adapter.checkpoint.bytes_read, packed)
