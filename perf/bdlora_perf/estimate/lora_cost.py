"""What each way of serving adapters holds, computes and sends on one rank.

With s the part of a module that a rank owns (1 / tp; more where KV heads are copied), shares of the whole factors are:

| | A of column-parallel | B of column-parallel | A of row-parallel | B of row-parallel | sent |
| --- | --- | --- | --- | --- | --- |
| local, n blocks | max(s, 1/n) | s/n | s/n | max(s, 1/n) | nothing |
| local, one block: replicated LoRA | 1 | s | s | 1 | nothing |
| local, shrink reduced: csgmv | 1 | s | s | 1 | all-reduce of the row-parallel shrink output |
| fully sharded: S-LoRA | 1/tp | s | s | 1/tp | all-gather (column), all-reduce (row) of the shrink output |
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from bdlora_perf.estimate.hardware import HOST, Collective, CollectiveKind, Kernel
from bdlora_perf.estimate.model_shape import BYTES_PER_WEIGHT, Linear, ModelShape
from bdlora_sglang.convert.sides import TPSide
from bdlora_sglang.errors import BDLoRAError

Sharding = Literal["local", "shrink reduced", "fully sharded"]
# What the ranks do between shrink and expand.
_COLLECTIVES: Mapping[tuple[Sharding, TPSide], CollectiveKind] = {
    ("shrink reduced", TPSide.ROW): "all-reduce",
    ("fully sharded", TPSide.COLUMN): "all-gather",
    ("fully sharded", TPSide.ROW): "all-reduce",
}


@dataclass(frozen=True)
class Assumptions:
    """What the kernels of LoRA do, where it is not known.

    Attributes:
        name: in a table.
        extra_kernels: of one decoder layer, beside a shrink and an expand for each of the four fused layers.
        read_for_every_token: in a decode step each token reads its adapter anew, though others have the same.
        latency: seconds of each collective that LoRA adds, in place of the measured ones.
        host: seconds that the host takes for a step while the GPU runs the one before; no step is shorter.
    """

    name: str
    extra_kernels: int = 0
    read_for_every_token: bool = False
    latency: float | None = None
    host: float = 0.0


# At the speed of memory or of arithmetic.
IDEAL = Assumptions("ideal kernels")
# vLLM starts 4 zero fills, 7 shrinks and 7 expands a layer.
_VLLM_EXTRA = 4 + 7 + 7 - 2 * 4
ASSUMPTIONS = (
    IDEAL,
    Assumptions("vLLM's starts", _VLLM_EXTRA),
    Assumptions("and re-read", _VLLM_EXTRA, read_for_every_token=True),
    Assumptions(f"and a host of {HOST.value:g} ms", _VLLM_EXTRA, read_for_every_token=True, host=HOST.value * 1e-3),
)


@dataclass(frozen=True)
class LocalFactors:
    """The factors of one adapter for one module on one rank.

    ``a`` and ``b`` count elements, ``shrunk`` the rows of A, ``expanded`` the columns of B, ``outputs`` the rows of B.
    """

    a: float
    b: float
    shrunk: float
    expanded: float
    outputs: float


@dataclass(frozen=True)
class Serving:
    """A way of serving adapters of one whole rank on all seven linear modules; rank 0 is the base model alone."""

    name: str
    label: str
    rank: int = 0
    nblocks: int = 1
    sharding: Sharding = "local"

    def parameters(self, shape: ModelShape) -> int:
        """Parameters of one adapter."""
        return int(self._local_parameters(shape, 1))

    def adapter_bytes(self, shape: ModelShape, tp: int) -> float:
        """Bytes of one adapter on one GPU."""
        return self._local_parameters(shape, tp) * BYTES_PER_WEIGHT

    def _local_parameters(self, shape: ModelShape, tp: int) -> float:
        factors = (self.local_factors(module, tp) for module in shape.linears(tp))
        return shape.layers * sum(f.a + f.b for f in factors)

    def local_factors(self, module: Linear, tp: int) -> LocalFactors:
        """What one of ``tp`` ranks holds for ``module``, which is cut for as many."""
        column = module.side is TPSide.COLUMN
        if self.sharding == "fully sharded":
            shrunk = math.ceil(self.rank / tp) if column else self.rank
            outputs = module.local_outputs if column else module.outputs / tp
            return LocalFactors(shrunk * module.local_inputs, outputs * self.rank, shrunk, self.rank, outputs)
        # Block-diagonal is the factor on the side that the ranks cut; the other one holds whole blocks.
        met = self.rank * max(module.shard, 1 / self.nblocks)
        block = self.rank / self.nblocks
        a, b = (met, block) if column else (block, met)
        return LocalFactors(a * module.local_inputs, b * module.local_outputs, met, met, module.local_outputs)


BASE = Serving("base", "base model")


def bd_lora(rank: int, nblocks: int, name: str = "bd-lora", label: str = "BD-LoRA") -> Serving:
    """Block-diagonal factors, sharded without communication; raises `BDLoRAError` unless blocks divide the rank."""
    if nblocks < 1 or rank < 1 or rank % nblocks:
        raise BDLoRAError(f"--blocks: found {nblocks} at rank {rank}, expected a divisor of the rank")
    return Serving(name, label, rank, nblocks)


def replicated(rank: int) -> Serving:
    """Plain LoRA as SGLang's triton_v2 serves it: the delta rides in the base layer's all-reduce."""
    return Serving("replicated", "LoRA, triton_v2", rank)


def csgmv(rank: int) -> Serving:
    """Plain LoRA as SGLang's default backend serves it."""
    return Serving("csgmv", "LoRA, csgmv", rank, sharding="shrink reduced")


def s_lora(rank: int) -> Serving:
    """Plain LoRA in S-LoRA's sharding."""
    return Serving("s-lora", "S-LoRA", rank, sharding="fully sharded")


def lora_work(
    shape: ModelShape, serving: Serving, tp: int, tokens: int, distinct: float
) -> tuple[list[Kernel], list[Collective]]:
    """LoRA of one decoder layer: shrink and expand of each fused layer in turn, and collectives between them.

    Every token has an adapter, ``distinct`` of them are different.
    """
    # SGLang's shrink output is bfloat16. vLLM's fully sharded layers exchange float32 (`_mcp_apply` in its
    # lora/layers/column_parallel_linear.py).
    shrunk_bytes = 4 if serving.sharding == "fully sharded" else BYTES_PER_WEIGHT
    kernels, collectives = [], []
    for layer in shape.fused_layers(tp) if serving.rank else ():
        factors = [serving.local_factors(module, tp) for module in layer]
        # The slices of a fused layer read the same input. Outputs are read and written: the delta is added to them.
        shrink_io = layer[0].local_inputs * BYTES_PER_WEIGHT + sum(f.shrunk for f in factors) * shrunk_bytes
        expand_io = sum(f.expanded * shrunk_bytes + 2 * f.outputs * BYTES_PER_WEIGHT for f in factors)
        for elements, io in ((sum(f.a for f in factors), shrink_io), (sum(f.b for f in factors), expand_io)):
            kernels.append(Kernel(2 * tokens * elements, distinct * elements * BYTES_PER_WEIGHT + tokens * io))
        kind = _COLLECTIVES.get((serving.sharding, layer[0].side))
        if kind is not None and tp > 1:
            collectives.append(Collective(kind, tokens * len(layer) * serving.rank * shrunk_bytes))
    return kernels, collectives
