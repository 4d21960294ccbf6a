"""The systems that are compared, and the adapters that each of them serves."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from bdlora_perf.estimate.lora_cost import bd_lora, replicated
from bdlora_perf.estimate.model_shape import ModelShape
from bdlora_sglang.errors import BDLoRAError

# `bdlora convert --param-ratio` rounds as generously.
_RATIO_SLACK = 0.005


@dataclass(frozen=True)
class AdapterShape:
    """An adapter on all seven linear modules; ``nblocks`` is None for plain LoRA."""

    rank: int
    nblocks: int | None


@dataclass(frozen=True)
class ServedSystem:
    """A way to serve adapters.

    Attributes:
        name: as ``--systems`` and the report call it.
        label: as tables show it.
        rank_factor: the rank of its adapters in multiples of the plain LoRA rank r; None serves no adapters.
        block_diagonal: BD-LoRA with one block a TP rank, else plain LoRA.
        flags: of the engine's command.
        needs_gpu: SGLang's own LoRA kernels have no CPU version.
        engine: whose server is started.
        launches: kernels that LoRA adds to a decoder layer (qkv, o, gate-up, down) on a GPU, whatever the batch, by its
            code; None where we do not know.
        collectives: what LoRA adds to a layer on several TP ranks, by the formulas of `bdlora_perf.collectives`.
        param_ratio: BD-LoRA of the largest rank whose parameters are at most this part of plain LoRA's, in place of a
            ``rank_factor``.
    """

    name: str
    label: str
    rank_factor: int | None = None
    block_diagonal: bool = False
    flags: tuple[str, ...] = ()
    needs_gpu: bool = False
    engine: Literal["bdlora", "vllm"] = "bdlora"
    param_ratio: float | None = None
    launches: int | None = None
    collectives: str = "none"

    def adapter(self, rank: int, tp: int, shape: ModelShape | None = None) -> AdapterShape | None:
        """What it serves where plain LoRA has rank ``rank``; ``shape`` of the model is for a ``param_ratio``.

        Raises:
            BDLoRAError: blocks cannot share the rank, or even the smallest rank is too large.
        """
        if self.param_ratio is not None:
            assert shape is not None, f"{self.name} needs the model's shape"
            plain, smallest = replicated(rank).parameters(shape), bd_lora(tp, tp).parameters(shape)
            multiple = int((self.param_ratio + _RATIO_SLACK) * plain / smallest)
            if multiple == 0:
                raise BDLoRAError(
                    f"--param-ratio {self.param_ratio:g}: found {smallest / plain:.2f} of LoRA's parameters at "
                    f"BD-LoRA's smallest rank, {tp}, expected no more"
                )
            return AdapterShape(multiple * tp, tp)
        if self.rank_factor is None:
            return None
        own_rank = self.rank_factor * rank
        if not self.block_diagonal:
            return AdapterShape(own_rank, None)
        if own_rank % tp:
            raise BDLoRAError(f"--rank {rank}: found rank {own_rank} for {self.name}, expected a multiple of TP {tp}")
        return AdapterShape(own_rank, tp)


_COMMUNICATION_FREE = ("--lora-sharding", "communication-free")
_FULLY_SHARDED = ("--lora-sharding", "fully-sharded")
_CSGMV = ("--lora-sharding", "sglang", "--lora-backend", "csgmv")
_TRITON_V2 = ("--lora-sharding", "sglang", "--lora-backend", "triton_v2")
# A shrink and an expand for each of four layers.
_LAUNCHES = 8
# S-LoRA gathers qkv's and gate-up's shrink outputs, and reduces o's and down's; csgmv reduces those beside the output.
_S_LORA, _REDUCES = "2 all-gathers, 2 all-reduces", "2 all-reduces"

# What the others are compared with; the first of those that take part is the main one.
BASELINES = (
    "lora-fully-sharded",
    "lora",
    "sglang-triton-v2",
    "sglang-csgmv",
    "vllm-lora-fully-sharded",
    "base",
    "vllm-base",
)


def _bd_lora(name: str, label: str, rank_factor: int | None = None, param_ratio: float | None = None) -> ServedSystem:
    return ServedSystem(
        name, label, rank_factor, True, _COMMUNICATION_FREE, param_ratio=param_ratio, launches=_LAUNCHES
    )


def _plain(
    name: str, label: str, flags: tuple[str, ...], collectives: str = "none", needs_gpu: bool = False
) -> ServedSystem:
    return ServedSystem(name, label, 1, flags=flags, needs_gpu=needs_gpu, launches=_LAUNCHES, collectives=collectives)


SYSTEMS: dict[str, ServedSystem] = {
    system.name: system
    for system in (
        ServedSystem("base", "Base model, no LoRA", launches=0),
        _bd_lora("bd-2r", "BD-LoRA, rank 2r", 2),
        _bd_lora("bd-4r", "BD-LoRA, rank 4r", 4),
        _plain("lora", "LoRA, communication-free", _COMMUNICATION_FREE),
        _plain("lora-fully-sharded", "LoRA, fully sharded (S-LoRA)", _FULLY_SHARDED, _S_LORA),
        _plain("sglang-csgmv", "LoRA, SGLang csgmv", _CSGMV, _REDUCES, needs_gpu=True),
        _plain("sglang-triton-v2", "LoRA, SGLang triton_v2", _TRITON_V2, needs_gpu=True),
    )
}
VLLM_SYSTEMS = (
    ServedSystem("vllm-base", "vLLM, base model", engine="vllm", launches=0),
    ServedSystem("vllm-lora", "vLLM, LoRA", 1, engine="vllm"),
    ServedSystem(
        "vllm-lora-fully-sharded",
        "vLLM, LoRA, fully sharded",
        1,
        flags=("--fully-sharded-loras",),
        engine="vllm",
        collectives=_S_LORA,
    ),
)


def matched_system(param_ratio: float) -> ServedSystem:
    """BD-LoRA of at most so many times plain LoRA's parameters."""
    if param_ratio <= 0:
        raise BDLoRAError(f"--param-ratio: found {param_ratio:g}, expected more than 0")
    label = f"BD-LoRA, {param_ratio:g}x LoRA's parameters"
    return _bd_lora(f"bd-{param_ratio:g}x", label, param_ratio=param_ratio)


def choose_systems(names: Iterable[str], has_gpu: bool, param_ratios: Sequence[float] = ()) -> list[ServedSystem]:
    """The named systems in their order, all that run here where none is named, and the matched ones.

    Raises:
        BDLoRAError: an unknown name, or a system that needs a GPU where there is none.
    """
    wanted = [*dict.fromkeys(names)] or [s.name for s in SYSTEMS.values() if has_gpu or not s.needs_gpu]
    for name in wanted:
        if name not in SYSTEMS:
            raise BDLoRAError(f"--systems: found {name!r}, expected names out of {', '.join(SYSTEMS)}")
        if SYSTEMS[name].needs_gpu and not has_gpu:
            raise BDLoRAError(f"--systems: found {name!r}, which needs a GPU, expected systems that run on a CPU")
    matched = [matched_system(ratio) for ratio in dict.fromkeys(param_ratios)]
    return [*(SYSTEMS[name] for name in wanted), *matched]


def check_on_one_rank(systems: Iterable[ServedSystem]) -> None:
    """Raise `BDLoRAError` for a system of which one rank alone is not a system."""
    for system in systems:
        if system.flags == _FULLY_SHARDED or system.engine != "bdlora":
            raise BDLoRAError(
                f"--one-rank-of: found {system.name!r}, expected systems of ours and of SGLang in which a "
                "rank computes LoRA without the others"
            )
