"""Proof, before a server says that it is ready, that its layers compute LoRA: with SGLang's own forward, on every rank.

A known adapter goes the whole way of every other one, from its tensors into a slot; what a layer then adds to its base
layer's output is compared with the dense product.
"""

import math

import numpy as np
import torch
from sglang.srt.distributed.parallel_state import GroupCoordinator
from sglang.srt.layers.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from sglang.srt.runtime_context import get_parallel

from bdlora_sglang.adapter import Adapter
from bdlora_sglang.errors import BDLoRAError
from bdlora_sglang.serving.backend import BatchInfo
from bdlora_sglang.serving.kernels import NO_SLOT
from bdlora_sglang.serving.local_adapter import AdapterPlan, plan_adapter, read_adapter
from bdlora_sglang.serving.manager import BDLoRAManager
from bdlora_sglang.serving.module_parts import ServedModule
from bdlora_sglang.serving.served_modules import VOCABULARY, layer_kind
from bdlora_sglang.serving.sharding import ExpertProjection, layer_shape

_TOKENS = 3
_RANKS = (8, 4, 2, 1)
# Of the delta's size. What is wrong is off by as much as the delta itself, and 16-bit types by less than a hundredth.
_TOLERANCE = 0.1
# How much larger than the base layer's output the delta is made: that is rounded, too.
_GAIN = 8.0


@torch.no_grad()
def prove_deltas(manager: BDLoRAManager, group: GroupCoordinator | None = None) -> list[str]:
    """Compute one layer of each kind (qkv_proj, o_proj, ...), and return their names.

    All ranks of ``group``, SGLang's TP group, must call this. The slots must be empty, and are so afterwards.

    Raises:
        BDLoRAError: a layer does not add the adapter's delta.
    """
    first_of_kind: dict[str, str] = {}
    for name in manager.memory_pool.slots.layers:
        kind = layer_kind(name)
        if kind not in VOCABULARY:  # which are given tokens, and rows of a batch
            first_of_kind.setdefault(kind, name)
    proofs = [_Proof(manager, name, group or get_parallel().tp_group) for name in first_of_kind.values()]
    return [proof.layer for proof in proofs if proof.run()]


class _Proof:
    def __init__(self, manager: BDLoRAManager, layer: str, group: GroupCoordinator) -> None:
        self.manager, self.layer, self.group = manager, layer, group
        modules = {name: module for by_name in manager.lora_modules for name, module in by_name.items()}
        self.wrapped = modules[layer]
        self.base = self.wrapped.base_layer

    def run(self) -> bool:
        """False where a slot is too small for any module, or the layer is no linear one or gathers its output."""
        is_linear = isinstance(self.base, (ColumnParallelLinear, RowParallelLinear, ReplicatedLinear, ExpertProjection))
        module = self._module_that_fits() if is_linear else None
        if module is None or getattr(self.base, "gather_output", False):
            return False
        name, rank = module
        (served,) = self.manager.served.parts[name]
        x_TI = self._random(_TOKENS, served.in_features)
        x_local = self._local_inputs(x_TI, served)
        base = self._forward(x_local)
        gain = _GAIN * max(self.group.all_gather_object(max(1.0, base.square().mean().sqrt().item())))
        adapter = self._adapter(name, rank, gain)
        delta = self._with_adapter(adapter, x_local) - base
        if served.row_parallel and served.tp_size > 1:
            delta = self.group.all_reduce(delta)
        expected = self._expected(adapter, x_TI, served)
        error, size = ((value.square().mean().sqrt().item()) for value in (delta.double() - expected, expected))
        if not error <= _TOLERANCE * size:
            raise BDLoRAError(
                f"BD-LoRA is not in place: layer '{self.layer}': found a delta that is off by {error:.3g}, expected "
                f"the adapter's, of size {size:.3g}"
            )
        return True

    def _module_that_fits(self) -> tuple[str, int] | None:
        """A module of the layer, and the rank of an adapter on it that every rank has room for."""
        parts_of = self.manager.served.parts
        names = [name for name, parts in parts_of.items() if len(parts) == 1 and parts[0].layer == self.layer]
        candidates = [(name, rank) for rank in _RANKS for name in names]
        fits = [self._fits(self._adapter(name, rank)) for name, rank in candidates]
        for candidate, *everywhere in zip(candidates, *self.group.all_gather_object(fits), strict=True):
            if all(everywhere):
                return candidate
        return None

    def _fits(self, adapter: Adapter) -> bool:
        try:
            self.manager.memory_pool.check_fits(self._plan(adapter))
        except BDLoRAError:
            return False
        return True

    def _adapter(self, name: str, rank: int, gain: float = 1.0) -> Adapter:
        """Plain LoRA, the same on every rank; its delta is ``gain`` in size for inputs of size one."""
        (served,) = self.manager.served.parts[name]
        a_RI = self._random(rank, served.in_features) / math.sqrt(served.in_features)
        b_OR = self._random(served.out_features, rank) * (gain / math.sqrt(rank))
        tensors = {
            f"base_model.model.{name}.lora_{factor}.weight": value for factor, value in (("A", a_RI), ("B", b_OR))
        }
        config = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": rank,
            "target_modules": [name.rpartition(".")[2]],
        }
        return Adapter.from_tensors(tensors, config, "the adapter that proves a layer")

    def _plan(self, adapter: Adapter) -> AdapterPlan:
        manager = self.manager
        return plan_adapter("proof", adapter, manager.served, manager.sharding, manager.dtype)

    def _random(self, *shape: int) -> torch.Tensor:
        """Of the model's type, on the CPU, the same whenever the shape is the same."""
        values = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
        return values.to(self.manager.dtype)

    def _local_inputs(self, x_TI: torch.Tensor, served: ServedModule) -> torch.Tensor:
        shard = served.shard
        x_local = torch.zeros(_TOKENS, layer_shape(self.layer, self.base).inputs, dtype=x_TI.dtype)
        x_local[:, shard.input_offset : shard.input_offset + len(shard.inputs)] = x_TI[:, _span(shard.inputs)]
        return x_local.to(self.manager.device)

    def _with_adapter(self, adapter: Adapter, x_local: torch.Tensor) -> torch.Tensor:
        """The wrapped layer's output, by way of slot 0."""
        manager, slots, backend = self.manager, self.manager.memory_pool.slots, self.manager.lora_backend
        local = read_adapter(self._plan(adapter), adapter, slots.host_block)
        slots.describe(local.packed)
        slots.write(0, local.packed)
        try:
            backend.batch_info = BatchInfo(True, manager.kernels.segments([0], [_TOKENS], graph=None))
            return self._forward(x_local)
        finally:
            backend.reset_batch_state()
            slots.clear(0)

    def _forward(self, x_local: torch.Tensor) -> torch.Tensor:
        """The layer's output on this rank alone, in float32; without a batch, SGLang runs the base layer."""
        if isinstance(self.base, ExpertProjection):
            slot = NO_SLOT if self.manager.lora_backend.batch_info is None else 0
            return self.wrapped(x_local, np.full(_TOKENS, slot)).float()
        options = {"skip_all_reduce": True} if isinstance(self.base, RowParallelLinear) else {}
        return self.wrapped(x_local, **options)[0].float()

    def _expected(self, adapter: Adapter, x_TI: torch.Tensor, served: ServedModule) -> torch.Tensor:
        """The dense product in float64; of a column-parallel layer, this rank's outputs."""
        (module,) = adapter.modules.values()
        checkpoint = adapter.checkpoint
        a_RI, b_OR = (
            checkpoint.read(name, *map(range, checkpoint.shape(name))).double()
            for name in (module.tensor_a, module.tensor_b)
        )
        delta_TO = x_TI.double() @ a_RI.T @ b_OR.T
        shard = served.shard
        expected = torch.zeros(_TOKENS, layer_shape(self.layer, self.base).outputs, dtype=torch.float64)
        outputs = shard.output_offset, shard.output_offset + len(shard.outputs)
        expected[:, outputs[0] : outputs[1]] = delta_TO[:, _span(shard.outputs)]
        return expected.to(self.manager.device)


def _span(features: range) -> slice:
    return slice(features.start, features.stop)
