"""What is measured: the options, who takes turns, and the flags of the servers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bdlora_perf.report.schema import Value
from bdlora_perf.serve.adapters import MadeAdapter, matched_adapter
from bdlora_perf.serve.systems import SYSTEMS

LORA = SYSTEMS["bd-2r"]
NOW, BEFORE = "now", "before"
# One slot, so that every adapter is cold when its first request comes. Before base requests went without a slot, they
# needed another.
_SLOTS = 2


@dataclass(frozen=True)
class SwapOptions:
    """What to measure.

    Attributes:
        model: folder or repo id of the base model.
        tps, ranks: the points; r of plain LoRA, BD-LoRA gets 2r in a block for each rank.
        loads: adapters that are loaded, used and unloaded in a turn.
        before: another checkout of this project, or None.
        dtype: of every server.
        server_flags: of ``bdlora launch``, for every server, after our own.
        work: folder for adapters and logs.
        command: what the user typed, for the report.
    """

    model: str
    vocabulary: int
    tps: Sequence[int]
    ranks: Sequence[int]
    loads: int
    rounds: int
    seed: int
    before: Path | None
    dtype: str
    server_flags: Sequence[str]
    work: Path
    command: str

    @property
    def systems(self) -> list[str]:
        return [NOW] if self.before is None else [NOW, BEFORE]

    @property
    def num_turns(self) -> int:
        return len(self.tps) * self.rounds * len(self.ranks) * len(self.systems)


@dataclass(frozen=True)
class Turn:
    """One system with adapters of one rank, in a round (from 1)."""

    round: int
    rank: int
    system: str

    def point(self, tp: int) -> dict[str, Value]:
        return {"tp": tp, "rank": self.rank}


def turns(options: SwapOptions) -> Iterator[Turn]:
    """Of one TP degree, in their order: the systems are neighbours at each point, each time another one first."""
    for round_ in range(1, options.rounds + 1):
        for i, rank in enumerate(options.ranks):
            by = (round_ + i) % len(options.systems)
            for system in [*options.systems[by:], *options.systems[:by]]:
                yield Turn(round_, rank, system)


def make_adapter(options: SwapOptions, tp: int, rank: int) -> MadeAdapter:
    """Raises `BDLoRAError` where its blocks do not fit the model."""
    shape = LORA.adapter(rank, tp)
    assert shape is not None
    return matched_adapter(options.work.resolve(), options.model, shape, options.seed)


def launch_flags(options: SwapOptions, tp: int) -> list[str]:
    """All flags of a server but its port; its slots are made for the largest adapter."""
    model = Path(options.model)
    largest = make_adapter(options, tp, max(options.ranks))
    return [
        *("--model", str(model.resolve()) if model.exists() else options.model, "--tp", str(tp)),
        *("--dtype", options.dtype),
        *("--adapters", f"largest={largest.folder}", "--max-loras-per-batch", str(_SLOTS)),
        *("--disable-radix-cache", "--max-running-requests", "8", *LORA.flags),
        *options.server_flags,
    ]
