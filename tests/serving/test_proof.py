"""A server whose layers do not compute LoRA does not start."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bdlora_kernels import EagerSlots
from bdlora_sglang.errors import BDLoRAError
from tests.serving.test_layers import as_rank  # noqa: F401


class Alone:
    """A TP group of one rank."""

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value]


def manager(dtype: torch.dtype, wrapper: Any = None) -> SimpleNamespace:
    """What the proof asks of a manager, with a fused and a row-parallel layer."""
    from sglang.srt.layers.linear import QKVParallelLinear, RowParallelLinear

    from bdlora_sglang.serving.backend import BDLoRABackend
    from bdlora_sglang.serving.communication_free import CommunicationFree
    from bdlora_sglang.serving.kernels import TorchKernels
    from bdlora_sglang.serving.layers import wrap_layer
    from bdlora_sglang.serving.served_modules import served_modules

    options = {"bias": False, "params_dtype": dtype, "parallel_group": "tp"}
    layers = {
        "model.layers.0.self_attn.qkv_proj": QKVParallelLinear(96, 8, 24, 12, **options),
        "model.layers.0.mlp.down_proj": RowParallelLinear(384, 96, reduce_results=False, **options),
    }
    model = torch.nn.Module()
    tree = torch.nn.ModuleDict({"self_attn": torch.nn.ModuleDict(), "mlp": torch.nn.ModuleDict()})
    model.add_module("model", torch.nn.ModuleDict({"layers": torch.nn.ModuleList([tree])}))
    for name, layer in layers.items():
        torch.nn.init.normal_(layer.weight)
        tree[name.split(".")[3]][name.split(".")[4]] = layer
    served = served_modules(model, object())
    sharding, kernels, backend = (
        CommunicationFree(),
        TorchKernels(torch.device("cpu")),
        BDLoRABackend(2, layer.weight.device),
    )
    backend.use(sharding, kernels)
    sizes = {name: sharding.slot_size(name, layer, 4) for name, layer in layers.items()}
    slots = EagerSlots(2, sizes, dtype, torch.device("cpu"), pin_memory=False)
    wrapped = {name: wrap_layer(name, layer, backend) for name, layer in layers.items()}
    for name, module in wrapped.items():
        module.set_lora_info(slots.layers[name])
    if wrapper is not None:
        wrapped["model.layers.0.mlp.down_proj"] = wrapper(wrapped["model.layers.0.mlp.down_proj"])

    def check_fits(plan: Any) -> None:
        if plan.local_rank > 4:
            raise BDLoRAError("too large")

    return SimpleNamespace(
        memory_pool=SimpleNamespace(slots=slots, check_fits=check_fits),
        lora_modules=[wrapped],
        served=served,
        sharding=sharding,
        kernels=kernels,
        lora_backend=backend,
        dtype=dtype,
        device=torch.device("cpu"),
    )


class Broken(torch.nn.Module):
    """A layer whose output is the base layer's, and ``factor`` times the delta."""

    def __init__(self, wrapped: Any, factor: float) -> None:
        super().__init__()
        self.wrapped, self.base_layer, self.backend = wrapped, wrapped.base_layer, wrapped.lora_backend
        self.factor = factor

    def forward(self, x: torch.Tensor, **options: Any) -> Any:
        output = self.wrapped(x, **options)[0]
        batch, self.backend.batch_info = self.backend.batch_info, None
        base = self.wrapped(x, **options)[0]
        self.backend.batch_info = batch
        return base + self.factor * (output - base), None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_that_compute_lora(as_rank: Any, dtype: torch.dtype) -> None:  # noqa: F811
    from bdlora_sglang.serving.proof import prove_deltas

    as_rank(0, 1)
    right = manager(dtype)
    assert prove_deltas(right, Alone()) == list(right.memory_pool.slots.layers)
    assert not any(any(layer.slices) for layer in right.memory_pool.slots.layers.values())
    assert right.lora_backend.batch_info is None


@pytest.mark.parametrize("factor", [0.0, 0.5, -1.0, 2.0, float("nan")])
def test_layers_that_do_not(as_rank: Any, factor: float) -> None:  # noqa: F811
    from bdlora_sglang.serving.proof import prove_deltas

    as_rank(0, 1)
    wrong = manager(torch.float32, lambda wrapped: Broken(wrapped, factor))
    with pytest.raises(BDLoRAError, match=r"not in place: layer 'model.layers.0.mlp.down_proj': found a delta"):
        prove_deltas(wrong, Alone())
