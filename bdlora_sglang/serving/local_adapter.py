"""One adapter's part on this rank, in host memory: exactly what a slot of the memory pool will hold."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from bdlora_kernels import HostBlock, LayerPlan, PackedAdapter, pack_adapter
from bdlora_sglang.adapter import Adapter, LoRAModule
from bdlora_sglang.errors import AdapterError
from bdlora_sglang.serving.layers import FUSED_MODULES, ServedModule, module_key
from bdlora_sglang.serving.sharding import Sharding


@dataclass(frozen=True)
class AdapterPlan:
    """What this rank will read of an adapter, by SGLang layer name, and what the start-up table says of it.

    ``local_rank`` is the largest rank, over all modules, that this GPU holds. ``targets`` are the SGLang layers that
    the adapter touches on any rank; ``layers`` holds those that it touches on this one.
    """

    name: str
    kind: str
    nblocks: int
    rank: int
    local_rank: int
    targets: frozenset[str]
    layers: Mapping[str, LayerPlan]


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
    name: str, adapter: Adapter, served: Mapping[str, ServedModule], sharding: Sharding, dtype: torch.dtype
) -> AdapterPlan:
    """Find this rank's part of ``adapter``, without reading it.

    Raises:
        AdapterError: a module that the base model does not have or with other dimensions.
    """
    by_layer: dict[str, list[LoRAModule]] = {}
    for module in adapter.modules.values():
        by_layer.setdefault(_find(module, adapter, served).layer, []).append(module)
    layers: dict[str, LayerPlan] = {}
    local_rank = 0
    for layer, modules in sorted(by_layer.items()):
        in_order = sorted(modules, key=_output_order)
        local = sharding.plan(adapter, [(module, served[module_key(module.name)]) for module in in_order], dtype)
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
    )


def read_adapter(plan: AdapterPlan, adapter: Adapter, allocate: Callable[[int], HostBlock]) -> LocalAdapter:
    """Read this rank's part into a block that ``allocate`` makes for so many elements.

    Raises:
        AdapterError: NaN, infinity, or a value too large for the model's type.
    """
    packed = pack_adapter(plan.layers, allocate)
    return LocalAdapter(plan, adapter.checkpoint.bytes_read, packed)


def _find(module: LoRAModule, adapter: Adapter, served: Mapping[str, ServedModule]) -> ServedModule:
    """The base model's module that ``module`` adapts, with the same dimensions."""
    found = served.get(module_key(module.name))
    source = adapter.checkpoint.source
    if found is None:
        kinds = sorted({key.rpartition(".")[2] for key in served})
        layers = [int(key.split(".")[1]) for key in served if key.startswith("layers.")]
        expected = f"one of {', '.join(kinds)} in layers 0 to {max(layers, default=0)}"
        raise AdapterError(
            source, f"module '{module.name}'", "no such parallel linear layer in the base model", expected
        )
    for what, tensor, size, expected_size in (
        ("input features", module.tensor_a, module.in_features, found.in_features),
        ("output features", module.tensor_b, module.out_features, found.out_features),
    ):
        if size != expected_size:
            raise AdapterError(source, f"tensor '{tensor}' {what}", size, f"{expected_size}, as the base model has")
    return found


def _output_order(module: LoRAModule) -> int:
    leaf = module.name.rpartition(".")[2]
    return next((names.index(leaf) for names in FUSED_MODULES.values() if leaf in names), 0)
