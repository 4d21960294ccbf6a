"""The contenders: LoRA, BD-LoRA of a rank that follows from LoRA's, and conversions of the trained LoRA."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from bdlora_perf.quality.init import Init
from bdlora_perf.synthetic.adapters import ALL_MODULES, ATTENTION_MODULES
from bdlora_sglang.convert.sides import TPSide, known_side
from bdlora_sglang.errors import BDLoRAError

Method = Literal["lora", "bd", "truncated", "calibrated", "healed"]
METHODS: tuple[Method, ...] = get_args(Method)
CONVERSIONS: tuple[Method, ...] = ("truncated", "calibrated", "healed")
TARGETS = {"attention": ATTENTION_MODULES, "all": ALL_MODULES}
# Further apart, two sizes are not called equal. The paper's pairs are 0.86 and 0.87 apart in their parameters.
_EQUAL = (0.8, 1.25)


@dataclass(frozen=True)
class TargetModule:
    """A linear module that gets LoRA; ``side`` says which factor BD-LoRA makes block-diagonal."""

    name: str
    side: TPSide
    inputs: int
    outputs: int


def target_modules(model: torch.nn.Module, target: str) -> list[TargetModule]:
    """The modules of ``model`` that ``--target-modules`` means.

    Raises:
        BDLoRAError: it is neither attention nor all, or the model has none of these modules.
    """
    if target not in TARGETS:
        raise BDLoRAError(f"--target-modules: found {target!r}, expected {' or '.join(TARGETS)}")
    found = []
    for name, module in model.named_modules():
        side = known_side(name) if name.rpartition(".")[2] in TARGETS[target] else None
        if isinstance(module, torch.nn.Linear) and side is not None:
            found.append(TargetModule(name, side, module.in_features, module.out_features))
    if not found:
        raise BDLoRAError(f"--target-modules {target}: found no such module in the model, expected Llama's names")
    return found


@dataclass(frozen=True, order=True)
class AdapterShape:
    """A whole rank; one block is plain LoRA."""

    rank: int
    nblocks: int = 1

    def parameters(self, modules: Iterable[TargetModule]) -> int:
        """Elements of both factors, as PEFT stores them."""
        per_block = self.rank // self.nblocks
        return sum(
            self.rank * dense + per_block * blocked
            for dense, blocked in (
                (m.inputs, m.outputs) if m.side is TPSide.COLUMN else (m.outputs, m.inputs) for m in modules
            )
        )


def matched_shape(modules: Sequence[TargetModule], rank: int, nblocks: int) -> AdapterShape | None:
    """BD-LoRA whose parameters are closest to those of plain LoRA of ``rank``; None where none is close."""
    plain = AdapterShape(rank).parameters(modules)
    smallest = AdapterShape(nblocks, nblocks).parameters(modules)
    shape = AdapterShape(max(1, round(plain / smallest)) * nblocks, nblocks)
    return shape if _equal(shape.parameters(modules), plain) else None


def closest_shape(rank: int, nblocks: int) -> AdapterShape | None:
    """BD-LoRA of the multiple of ``nblocks`` that is closest to ``rank``; None where none is close."""
    shape = AdapterShape(max(1, round(rank / nblocks)) * nblocks, nblocks)
    return shape if _equal(shape.rank, rank) else None


def _equal(size: int, other: int) -> bool:
    low, high = _EQUAL
    return low <= size / other <= high


@dataclass(frozen=True)
class System:
    """A contender over all ranks: ``shapes`` by the rank r of plain LoRA that it stands beside.

    ``kind`` is what plots show together, ``family`` one line in them.
    """

    name: str
    label: str
    kind: str
    family: str
    method: Method
    nblocks: int
    init: Init
    shapes: dict[int, AdapterShape]


def make_systems(
    modules: Sequence[TargetModule],
    methods: Sequence[Method],
    ranks: Sequence[int],
    blocks: Sequence[int],
    multiples: Sequence[int],
    inits: Sequence[Init],
) -> list[System]:
    """All contenders in the order of reports.

    BD-LoRA comes at each of ``multiples`` of r, rounded to a rank that the blocks divide, and at the rank that matches
    LoRA's parameters, where that is another one. Initial values but the first of ``inits``, and conversions, are tried
    at the matched rank.

    Raises:
        BDLoRAError: a module's blocked features cannot be cut in so many blocks.
    """
    systems = [System("lora", "LoRA", "LoRA", "LoRA", "lora", 1, inits[0], {r: AdapterShape(r) for r in ranks})]
    for nblocks in blocks:
        _check_blocks(modules, nblocks)
        matched = {r: shape for r in ranks if (shape := matched_shape(modules, r, nblocks)) is not None}
        if "bd" in methods:
            systems += _trained(ranks, nblocks, multiples, inits, matched)
        for method in CONVERSIONS:
            if method in methods:
                family = f"converted, {method}, {nblocks} blocks"
                label = f"LoRA converted to {nblocks} blocks, {method}"
                systems.append(
                    System(f"{method}-{nblocks}", label, "conversion", family, method, nblocks, inits[0], matched)
                )
    return [system for system in systems if system.shapes]


def _trained(
    ranks: Sequence[int],
    nblocks: int,
    multiples: Sequence[int],
    inits: Sequence[Init],
    matched: dict[int, AdapterShape],
) -> list[System]:
    name, label = f"bd{nblocks}", f"BD-LoRA, {nblocks} blocks"
    by_suffix = {
        f"{m}r": {r: shape for r in ranks if (shape := closest_shape(m * r, nblocks)) is not None}
        for m in sorted(multiples)
    }
    same = [suffix for suffix, shapes in by_suffix.items() if shapes == matched]
    if not same:
        by_suffix = {"matched": matched, **by_suffix}
    words = {suffix: "matched rank" if suffix == "matched" else f"rank {suffix}" for suffix in by_suffix}
    systems = [
        System(f"{name}-{s}", f"{label}, {words[s]}", "BD-LoRA", label, "bd", nblocks, inits[0], shapes)
        for s, shapes in by_suffix.items()
    ]
    suffix = same[0] if same else "matched"
    for init in inits[1:]:
        text = f"{init} initial values"
        long_label = f"{label}, {words[suffix]}, {text}"
        long_family = f"{label}, {text}"
        systems.append(
            System(f"{name}-{suffix}-{init}", long_label, "initial values", long_family, "bd", nblocks, init, matched)
        )
    return systems


def _check_blocks(modules: Sequence[TargetModule], nblocks: int) -> None:
    if nblocks < 2:
        raise BDLoRAError(f"--blocks: found {nblocks}, expected at least 2 (one block is a plain LoRA)")
    for module in modules:
        size = module.outputs if module.side is TPSide.COLUMN else module.inputs
        if size % nblocks:
            raise BDLoRAError(f"--blocks {nblocks}: found {size} features in {module.name}, expected a multiple")
