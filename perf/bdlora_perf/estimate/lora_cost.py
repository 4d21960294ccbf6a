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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from bdlora_perf.estimate.base_cost import Work
from bdlora_perf.estimate.collectives import Collective, Kind
from bdlora_perf.estimate.hardware import HOST
from bdlora_perf.estimate.model_shape import BYTES_PER_WEIGHT, Linear, ModelShape
from bdlora_sglang.convert.sides import TPSide
from bdlora_sglang.errors import BDLoRAError


class Sharding(Enum):
    LOCAL = "local"
    SHRINK_REDUCED = "shrink reduced"
    FULLY_SHARDED = "fully sharded"


@dataclass(frozen=True)
class _Exchange:
    """What the ranks exchange between shrink and expand of a fused layer, and kernels besides these two."""

    kind: Kind
    element_bytes: int
    extra_kernels: int


# SGLang's shrink output is bfloat16. vLLM's fully sharded layers exchange float32 (`_mcp_apply` in its
# lora/layers/column_parallel_linear.py), and its all-gather along the last dimension ends in a copy.
_EXCHANGES: Mapping[tuple[Sharding, TPSide], _Exchange] = {
    (Sharding.SHRINK_REDUCED, TPSide.ROW): _Exchange(Kind.ALL_REDUCE, 2, 0),
    (Sharding.FULLY_SHARDED, TPSide.COLUMN): _Exchange(Kind.ALL_GATHER, 4, 1),
    (Sharding.FULLY_SHARDED, TPSide.ROW): _Exchange(Kind.ALL_REDUCE, 4, 0),
}


@dataclass(frozen=True)
class Assumptions:
    """What the kernels of LoRA do, where it is not known.

    Attributes:
        name: in a table.
        launches: kernels of one decoder layer as vLLM starts them, 4 zero fills, 7 shrinks and 7 expands, in place of a
            shrink and an expand for each of the four fused layers.
        read_for_every_token: in a decode step each token reads its adapter anew, though others have the same.
        latency: seconds of each collective that LoRA adds, in place of the measured ones.
        host: seconds that the host takes for a step while the GPU runs the one before; no step is shorter.
    """

    name: str
    launches: bool = False
    read_for_every_token: bool = False
    latency: float | None = None
    host: float = 0.0


# At the speed of memory or of arithmetic.
IDEAL = Assumptions("ideal kernels")
ASSUMPTIONS = (
    IDEAL,
    Assumptions("vLLM's starts", launches=True),
    Assumptions("and re-read", launches=True, read_for_every_token=True),
    Assumptions(f"and a host of {HOST.value:g} ms", True, True, host=HOST.value * 1e-3),
)
# Of vLLM, beside those that `_lora_layer` counts.
VLLM_EXTRA_KERNELS = 4 + 7 + 7 - 2 * 4


@dataclass(frozen=True)
class Serving:
    """A way of serving adapters of one whole rank on all seven linear modules; rank 0 is the base model alone."""

    name: str
    label: str
    rank: int = 0
    nblocks: int = 1
    sharding: Sharding = Sharding.LOCAL

    def check_tp(self, tp: int) -> None:
        """Raise `BDLoRAError` for blocks that neither divide the ranks nor are divided by them."""
        if self.nblocks % tp and tp % self.nblocks:
            raise BDLoRAError(f"--blocks: found {self.nblocks} on TP {tp}, expected one to divide the other")

    def parameters(self, shape: ModelShape) -> int:
        """Parameters of one adapter."""
        return shape.layers * sum(
            self.rank * dense + self.rank // self.nblocks * blocked
            for dense, blocked in (
                (m.inputs, m.outputs) if m.side is TPSide.COLUMN else (m.outputs, m.inputs) for m in shape.linears()
            )
        )


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
    return Serving("csgmv", "LoRA, csgmv", rank, sharding=Sharding.SHRINK_REDUCED)


def s_lora(rank: int) -> Serving:
    """Plain LoRA in S-LoRA's sharding."""
    return Serving("s-lora", "S-LoRA", rank, sharding=Sharding.FULLY_SHARDED)


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


def local_factors(module: Linear, serving: Serving, tp: int) -> LocalFactors:
    rank, column = serving.rank, module.side is TPSide.COLUMN
    if serving.sharding is Sharding.FULLY_SHARDED:
        chunk = math.ceil(rank / tp)
        shrunk, outputs = (chunk, module.local_outputs) if column else (rank, module.outputs / tp)
        return LocalFactors(shrunk * module.local_inputs, outputs * rank, shrunk, rank, outputs)
    # Block-diagonal is the factor on the side that the ranks cut; the other one holds whole blocks.
    met = rank * max(module.shard, 1 / serving.nblocks)
    block = rank / serving.nblocks
    a, b = (met, block) if column else (block, met)
    return LocalFactors(a * module.local_inputs, b * module.local_outputs, met, met, module.local_outputs)


def adapter_bytes(shape: ModelShape, serving: Serving, tp: int) -> float:
    """Bytes of one adapter on one GPU."""
    factors = (local_factors(module, serving, tp) for module in shape.linears(tp))
    return shape.layers * sum(f.a + f.b for f in factors) * BYTES_PER_WEIGHT


@dataclass(frozen=True)
class LoRALayer:
    """LoRA of one fused layer in one step: its kernels with work to do, others, and what the ranks exchange."""

    kernels: tuple[Work, ...]
    extra_kernels: int
    exchange: Collective | None


def lora_layers(shape: ModelShape, serving: Serving, tp: int, tokens: int, distinct: float) -> Iterator[LoRALayer]:
    """LoRA of the fused layers of one decoder layer; every token has an adapter, ``distinct`` of them are different."""
    if serving.rank:
        for layer in shape.fused_layers(tp):
            yield _lora_layer(layer, serving, tp, tokens, distinct)


def _lora_layer(layer: Sequence[Linear], serving: Serving, tp: int, tokens: int, distinct: float) -> LoRALayer:
    factors = [local_factors(module, serving, tp) for module in layer]
    rule = _EXCHANGES.get((serving.sharding, layer[0].side))
    between_bytes = rule.element_bytes if rule else BYTES_PER_WEIGHT
    # The slices of a fused layer read the same input. Outputs are read and written: the delta is added to them.
    shrink_io = layer[0].local_inputs * BYTES_PER_WEIGHT + sum(f.shrunk for f in factors) * between_bytes
    expand_io = sum(f.expanded * between_bytes + 2 * f.outputs * BYTES_PER_WEIGHT for f in factors)
    kernels = tuple(
        Work(2 * tokens * elements, distinct * elements * BYTES_PER_WEIGHT + tokens * io)
        for elements, io in ((sum(f.a for f in factors), shrink_io), (sum(f.b for f in factors), expand_io))
    )
    if rule is None or tp == 1:
        return LoRALayer(kernels, 0, None)
    exchange = Collective(rule.kind, tokens * len(layer) * serving.rank, rule.element_bytes)
    return LoRALayer(kernels, rule.extra_kernels, exchange)
