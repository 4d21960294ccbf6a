"""What is measured: layers of Llama-3.1 on one GPU, and batches of tokens over adapters."""

import itertools
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

Phase = Literal["decode", "prefill"]
Distribution = Literal["distinct", "uniform", "skewed", "identical"]
# Tokens and adapters of each.
Batches = list[tuple[int, int]]

HEAD_SIZE, KV_HEADS = 128, 8
# Hidden size, intermediate size, layers. The tiny one is for the interpreter.
MODELS = {"Llama-3.1-70B": (8192, 28672, 80), "Llama-3.1-8B": (4096, 14336, 32), "tiny": (256, 512, 1)}
LAYERS = ("qkv", "o", "gate_up", "down")


@dataclass(frozen=True)
class Layer:
    """One linear layer on one GPU; a slice has ``outputs[i]`` outputs and an A of its own."""

    inputs: int
    outputs: tuple[int, ...]

    @property
    def total_outputs(self) -> int:
        return sum(self.outputs)


@dataclass(frozen=True)
class Case:
    """A batch at a layer. ``rank`` is the local rank of a slice: that of a BD-LoRA with ``tp`` blocks over ``tp``."""

    model: str
    tp: int
    layer: str
    phase: Phase
    tokens: int
    adapters: int
    distribution: Distribution
    rank: int
    dtype: str = "bfloat16"

    @property
    def point(self) -> dict[str, str | int]:
        return asdict(self)

    def shape(self) -> Layer:
        """The shard of one rank; KV heads are replicated when there are fewer than ranks."""
        hidden, intermediate, _ = MODELS[self.model]
        kv = max(KV_HEADS // self.tp, 1) * HEAD_SIZE
        return {
            "qkv": Layer(hidden, (hidden // self.tp, kv, kv)),
            "o": Layer(hidden // self.tp, (hidden,)),
            "gate_up": Layer(hidden, (intermediate // self.tp,) * 2),
            "down": Layer(intermediate // self.tp, (hidden,)),
        }[self.layer]

    def slots(self) -> list[int]:
        """The adapter of each token, 0 to ``adapters`` - 1; in a prefill, the tokens of an adapter are neighbours."""
        source = random.Random(0)
        if self.distribution == "distinct":
            slots = [token % self.adapters for token in range(self.tokens)]
        elif self.distribution == "identical":
            slots = [0] * self.tokens
        elif self.distribution == "uniform":
            slots = [source.randrange(self.adapters) for _ in range(self.tokens)]
        else:
            # The n-th most popular adapter is asked for 1.5**-n as often as the first.
            weights = [1.5**-adapter for adapter in range(self.adapters)]
            slots = source.choices(range(self.adapters), weights, k=self.tokens)
        return sorted(slots) if self.phase == "prefill" else slots

    def matched_ranks(self) -> dict[str, int]:
        """Plain LoRA ranks that a BD-LoRA of this local rank is matched with: its whole rank is 2 r or 4 r."""
        whole = self.rank * self.tp
        return {f"r{factor}": whole // factor for factor in (2, 4) if whole % factor == 0}

    def floor_bytes(self) -> int:
        """The fewest bytes: factors of the adapters in the batch, x once, y read and written."""
        shape, slices = self.shape(), len(self.shape().outputs)
        factors = len(set(self.slots())) * self.rank * (slices * shape.inputs + shape.total_outputs)
        return 2 * (factors + self.tokens * (shape.inputs + 2 * shape.total_outputs))

    def floating_point_operations(self) -> int:
        shape = self.shape()
        return 2 * self.tokens * self.rank * (len(shape.outputs) * shape.inputs + shape.total_outputs)


def tiny_cases() -> Iterator[Case]:
    """Cases that the interpreter can do."""
    yield from _cases("tiny", 2, "decode", [(5, 3)], ["uniform"], [4])
    yield from _cases("tiny", 2, "prefill", [(70, 2)], ["skewed"], [8])


def all_cases() -> Iterator[Case]:
    """Every case once, the most telling first: a run that is out of time has them."""
    yield from dict.fromkeys(_ordered())


def _ordered() -> Iterator[Case]:
    big, small, _ = MODELS
    decode = [(1, 1), (16, 16), (64, 16), (64, 64), (256, 64), (256, 1)]
    yield from _cases(big, 8, "decode", [(64, 64), (16, 16), (1, 1)], ["uniform"], [8])
    yield from _cases(big, 8, "prefill", [(4096, 8)], ["skewed"], [8])
    yield from _cases(big, 8, "decode", decode, ["uniform"], [8, 4, 16, 2, 32, 64])
    yield from _cases(big, 8, "prefill", [(512, 4), (8192, 16)], ["skewed"], [8, 16, 64])
    yield from _cases(big, 8, "decode", [(64, 64)], ["distinct", "skewed", "identical"], [8])
    yield from _cases(small, 8, "decode", decode, ["uniform"], [8, 4, 16])
    for tp in (4, 1):
        yield from _cases(big, tp, "decode", decode, ["uniform"], [16])
        yield from _cases(small, tp, "decode", decode, ["uniform"], [16])
        yield from _cases(big, tp, "prefill", [(4096, 8)], ["skewed"], [16])


def _cases(
    model: str, tp: int, phase: Phase, batches: Batches, distributions: list[Distribution], ranks: list[int]
) -> Iterator[Case]:
    for rank, distribution, (tokens, adapters), layer in itertools.product(ranks, distributions, batches, LAYERS):
        yield Case(model, tp, layer, phase, tokens, adapters, distribution, rank)
