"""What is measured: the options, who takes turns, and the flags of the servers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bdlora_perf.estimate.model_shape import ModelShape
from bdlora_perf.report.schema import Value
from bdlora_perf.serve.adapters import MadeAdapter, adapter_flags, matched_adapter
from bdlora_perf.serve.systems import SYSTEMS

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
BASE, LORA = SYSTEMS["base"], SYSTEMS["bd-2r"]


@dataclass(frozen=True)
class Contender:
    """A column of the report: requests for the base model, or for adapters, to the server of one checkout."""

    name: str
    label: str
    before: bool
    has_adapters: bool


CONTENDERS = tuple(
    Contender(
        f"{system.name}-before" if before else system.name,
        f"{system.label}, before" if before else system.label,
        before,
        system is LORA,
    )
    for before in (False, True)
    for system in (BASE, LORA)
)


@dataclass(frozen=True)
class Deployment:
    """Servers that are up at the same time: one, or one of each checkout."""

    tp: int
    dtype: str

    def point(self) -> dict[str, Value]:
        return {"tp": self.tp, "dtype": self.dtype}

    def __str__(self) -> str:
        return f"tp {self.tp}, {self.dtype}"


@dataclass(frozen=True)
class EngineOptions:
    """What to measure.

    Attributes:
        model: folder or repo id of the base model.
        shape: of the model.
        tps, dtypes, requests: the points; a server for each TP degree and dtype, batches of each number of requests.
        adapters: how many each server holds, all of them in slots at once.
        rank: r of plain LoRA; BD-LoRA gets 2r, in a block for each rank.
        input_len: tokens of each prompt.
        decode_steps: decode steps of one batch.
        before: another checkout of this project, or None.
        server_flags: of ``bdlora launch``, for every server, after our own.
        work: folder for adapters and logs.
        command: what the user typed, for the report.
    """

    model: str
    shape: ModelShape
    tps: Sequence[int]
    dtypes: Sequence[str]
    requests: Sequence[int]
    adapters: int
    rank: int
    input_len: int
    decode_steps: int
    rounds: int
    seed: int
    before: Path | None
    server_flags: Sequence[str]
    work: Path
    command: str

    @property
    def contenders(self) -> list[Contender]:
        return [contender for contender in CONTENDERS if self.before is not None or not contender.before]

    @property
    def deployments(self) -> list[Deployment]:
        return [Deployment(tp, dtype) for tp in self.tps for dtype in self.dtypes]

    @property
    def num_turns(self) -> int:
        return len(self.deployments) * self.rounds * len(self.requests) * len(self.contenders)

    @property
    def batch_tokens(self) -> int:
        """Tokens in the KV cache at the end of the largest batch."""
        return max(self.requests) * (self.input_len + self.decode_steps + 1)


@dataclass(frozen=True)
class Turn:
    """One contender with a batch of some requests, in a round (from 1)."""

    round: int
    requests: int
    contender: Contender


def turns(options: EngineOptions) -> Iterator[Turn]:
    """Of one deployment, in their order: the contenders are neighbours at each point, each time another one first."""
    contenders = options.contenders
    for round_ in range(1, options.rounds + 1):
        for i, requests in enumerate(options.requests):
            by = (round_ - 1 + i) % len(contenders)
            for contender in [*contenders[by:], *contenders[:by]]:
                yield Turn(round_, requests, contender)


def make_adapter(options: EngineOptions, tp: int) -> MadeAdapter:
    """The adapter that all names of a server stand for; raises `BDLoRAError` where its blocks do not fit."""
    shape = LORA.adapter(options.rank, tp)
    assert shape is not None
    return matched_adapter(options.work.resolve(), options.model, shape, options.seed)


def common_flags(options: EngineOptions) -> list[str]:
    """Those that are the same for every server, its adapters apart.

    A batch is to be prefilled in one forward pass and decoded together, and nothing is to come out of a cache.
    """
    prefill = max(8192, max(options.requests) * options.input_len)
    sizes = {
        # Ample, for SGLang keeps some free; not all there is, for other servers stand beside this one.
        "--max-total-tokens": 2 * options.batch_tokens + 4096,
        "--max-running-requests": max(options.requests) + 1,
        "--chunked-prefill-size": prefill,
        "--max-prefill-tokens": prefill,
    }
    flags = [word for name, value in sizes.items() for word in (name, str(value))]
    return ["--disable-radix-cache", *flags, *LORA.flags]


def launch_flags(options: EngineOptions, deployment: Deployment) -> list[str]:
    """All flags of a server but its port; paths are absolute, as servers of another checkout run elsewhere."""
    model = Path(options.model)
    flags = ["--model", str(model.resolve()) if model.exists() else options.model]
    flags += ["--tp", str(deployment.tp), "--dtype", deployment.dtype, *common_flags(options)]
    flags += adapter_flags(make_adapter(options, deployment.tp), options.adapters)
    # Before base requests went without a slot, they took one like an adapter, and would have thrown one out.
    return [*flags, "--max-loras-per-batch", str(options.adapters + 1), *options.server_flags]
