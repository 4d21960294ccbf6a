"""One adapter's part on this rank, in host memory: exactly what a slot of the memory pool will hold."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from bdlora_kernels import PackedFactors
from bdlora_sglang.adapter import Adapter, LoRAModule
from bdlora_sglang.errors import AdapterError
from bdlora_sglang.serving.layers import FUSED_MODULES, ServedModule, module_key
from bdlora_sglang.serving.sharding import Sharding


@dataclass(frozen=True)
class LocalAdapter:
    """The factors by SGLang layer name, and what the start-up table says of the adapter.

    ``local_rank`` is the largest rank, over all modules, that this GPU holds. ``targets`` are the SGLang layers that
    the adapter touches on any rank; ``layers`` holds those that it touches on this one.
    """

    name: str
    kind: str
    nblocks: int
    rank: int
    local_rank: int
    bytes_read: int
    targets: frozenset[str]
    layers: Mapping[str, PackedFactors]

    @property
    def num_bytes(self) -> int:
        return sum(factors.num_bytes for factors in self.layers.values())


def load_local_adapter(
    name: str,
    adapter: Adapter,
    served: Mapping[str, ServedModule],
    sharding: Sharding,
    dtype: torch.dtype,
    pin_memory: bool,
) -> LocalAdapter:
    """Read this rank's part of ``adapter``.

    Raises:
        AdapterError: a module that the base model does not have or with other dimensions, NaN or infinity.
    """
    by_layer: dict[str, list[LoRAModule]] = {}
    for module in adapter.modules.values():
        by_layer.setdefault(_find(module, adapter, served).layer, []).append(module)
    layers: dict[str, PackedFactors] = {}
    local_rank = 0
    for layer, modules in sorted(by_layer.items()):
        in_order = sorted(modules, key=_output_order)
        local = sharding.read(adapter, [(module, served[module_key(module.name)]) for module in in_order], dtype)
        if local is not None:
            layers[layer] = _pin(local.packed) if pin_memory else local.packed
            local_rank = max(local_rank, local.rank)
    return LocalAdapter(
        name=name,
        kind=adapter.kind,
        nblocks=adapter.nblocks,
        rank=adapter.max_rank,
        local_rank=local_rank,
        bytes_read=adapter.checkpoint.bytes_read,
        targets=frozenset(by_layer),
        layers=layers,
    )


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


def _pin(packed: PackedFactors) -> PackedFactors:
    return replace(packed, a_E=packed.a_E.pin_memory(), b_E=packed.b_E.pin_memory())
