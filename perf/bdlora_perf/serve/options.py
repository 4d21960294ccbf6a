"""What is measured, and what is known of it while it is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bdlora_perf.engine.bandwidth import shape_of
from bdlora_perf.report.schema import Value
from bdlora_perf.serve.adapters import MadeAdapter
from bdlora_perf.serve.load import Api
from bdlora_perf.serve.systems import AdapterShape, ServedSystem
from bdlora_perf.serve.workload import Workload

# A multiple of every engine's blocks.
_KV_STEP = 64


@dataclass(frozen=True)
class ServeOptions:
    """What to measure.

    Attributes:
        model: folder or repo id of the base model; None only where all servers run already.
        tp: TP degree of the servers that are started.
        one_rank_of: where it is not 1, the model is one of so many TP ranks of ``whole_model``, without weights, and
            adapters are what that rank holds.
        systems: those to be started here.
        urls: running servers by the name that the report gives them, and ``url_adapters`` the adapters to ask them for
            (none: those that they list).
        workloads: the points, those of one deployment side by side.
        rounds: how often each point is measured on each system.
        rounds_a_start: for so many rounds a server stays up where one is up at a time.
        bounds: of goodput, in milliseconds, by ttft, tpot or e2el.
        find_rate: look for the highest rate within the bounds.
        keep_servers: all servers are up at once, else one at a time.
        dtype, kv_tokens: of every server that is started.
        server_flags: of ``bdlora launch``, for every server of ours.
        vllm_environment: where vLLM is installed.
        has_gpu: of this machine.
        work: folder for adapters and logs.
        command: what the user typed, for the report.
    """

    model: str | None
    tp: int
    systems: Sequence[ServedSystem]
    urls: Mapping[str, str]
    workloads: Sequence[Workload]
    rounds: int
    bounds: Mapping[str, float]
    keep_servers: bool
    dtype: str
    server_flags: Sequence[str]
    seed: int
    work: Path
    command: str
    kv_tokens: int | None = None
    find_rate: bool = False
    url_adapters: Sequence[str] = ()
    vllm_environment: Path | None = None
    has_gpu: bool = False
    rounds_a_start: int = 1
    one_rank_of: int = 1
    whole_model: str | None = None

    @property
    def names(self) -> list[str]:
        return [*(system.name for system in self.systems), *self.urls]

    @property
    def ranks(self) -> list[int]:
        """Of plain LoRA."""
        return list(dict.fromkeys(workload.rank for workload in self.workloads))

    @property
    def num_turns(self) -> int:
        return len(self.workloads) * self.rounds * len(self.names)

    @property
    def starts_once(self) -> bool:
        """Each system is started once, one after the other."""
        return not self.keep_servers and self.rounds_a_start >= self.rounds

    @property
    def kv_cache(self) -> int:
        """Tokens of every server's KV cache: ample, as SGLang keeps some free, and as other servers stand beside it."""
        tokens = self.kv_tokens or 2 * max(workload.kv_tokens for workload in self.workloads) + 4096
        return -(-tokens // _KV_STEP) * _KV_STEP

    @property
    def max_requests(self) -> int:
        return max(workload.concurrency or 256 for workload in self.workloads)

    @property
    def common_flags(self) -> list[str]:
        """The same for every server of ours; with the same model, cores and KV cache as vLLM's."""
        flags = ["--model", str(self.model), "--tp", str(self.tp), "--dtype", self.dtype]
        flags += ["--max-total-tokens", str(self.kv_cache), "--max-running-requests", str(self.max_requests)]
        if self.one_rank_of > 1:
            flags += ["--load-format", "dummy"]
        return [*flags, "--disable-radix-cache"]

    @property
    def num_ranks(self) -> int:
        """Ranks of the system that is measured, here or as one of its ranks."""
        return self.tp * self.one_rank_of

    def shape(self, system: ServedSystem, rank: int) -> AdapterShape | None:
        """What a system serves where plain LoRA has this rank; on one rank of a model, that rank's block."""
        model_shape = shape_of(self.whole_model or str(self.model)) if system.param_ratio is not None else None
        shape = system.adapter(rank, self.num_ranks, model_shape)
        if shape is None or shape.nblocks is None or self.one_rank_of == 1:
            return shape
        return AdapterShape(shape.rank // self.one_rank_of, 1)


@dataclass
class Benchmark:
    """What is known of a sweep so far: adapters by shape, what each system runs, and the API that all are asked by."""

    options: ServeOptions
    adapters: dict[AdapterShape, MadeAdapter] = field(default_factory=dict)
    runs: dict[str, Mapping[str, Value]] = field(default_factory=dict)
    api: Api | None = None

    def adapter(self, system: ServedSystem, rank: int) -> MadeAdapter | None:
        """What a system serves where plain LoRA has this rank; None for the base model."""
        shape = self.options.shape(system, rank)
        return None if shape is None else self.adapters[shape]
