"""The contenders: LoRA, BD-LoRA of a rank that follows from LoRA's, and conversions of the trained LoRA."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal, get_args

import torch

from bdlora_perf.estimate.lora_cost import Serving, bd_lora, s_lora
from bdlora_perf.estimate.model_shape import Linear
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


def target_modules(model: torch.nn.Module, target: str) -> dict[str, Linear]:
    """The modules of ``model`` that ``--target-modules`` means, by name.

    Raises:
        BDLoRAError: the model has none of them.
    """
    found = {
        name: Linear(side, module.in_features, module.out_features, shard=1)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and name.rpartition(".")[2] in TARGETS[target]
        and (side := known_side(name)) is not None
    }
    if not found:
        raise BDLoRAError(f"--target-modules {target}: found no such module in the model, expected Llama's names")
    return found


@dataclass(frozen=True, order=True)
class AdapterShape:
    """A whole rank; one block is plain LoRA."""

    rank: int
    nblocks: int = 1

    @property
    def serving(self) -> Serving:
        """As ``bdlora perf estimate`` has it; plain LoRA is what the paper compares with, fully sharded."""
        return s_lora(self.rank) if self.nblocks == 1 else bd_lora(self.rank, self.nblocks)

    def parameters(self, modules: Mapping[str, Linear]) -> int:
        """Elements of both factors, as PEFT stores them."""
        factors = (self.serving.local_factors(module, tp=1) for module in modules.values())
        return int(sum(factor.a + factor.b for factor in factors))


def matched_shape(modules: Mapping[str, Linear], rank: int, nblocks: int) -> AdapterShape | None:
    """BD-LoRA whose parameters are closest to those of plain LoRA of ``rank``; None where none is close."""
    return _closest(nblocks, AdapterShape(rank).parameters(modules), lambda shape: shape.parameters(modules))


def _closest(nblocks: int, wanted: int, size: Callable[[AdapterShape], int]) -> AdapterShape | None:
    """BD-LoRA of the multiple of ``nblocks`` whose size is closest to ``wanted``; None where none is close."""
    shape = AdapterShape(max(1, round(wanted / size(AdapterShape(nblocks, nblocks)))) * nblocks, nblocks)
    low, high = _EQUAL
    return shape if low <= size(shape) / wanted <= high else None


Shapes = dict[int, AdapterShape]


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
    init: Init
    shapes: Shapes


def make_systems(
    modules: Mapping[str, Linear],
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
    systems = [System("lora", "LoRA", "LoRA", "LoRA", "lora", inits[0], {r: AdapterShape(r) for r in ranks})]
    for nblocks in blocks:
        for name, module in modules.items():
            size = module.outputs if module.side is TPSide.COLUMN else module.inputs
            if size % nblocks:
                raise BDLoRAError(f"--blocks {nblocks}: found {size} features in {name}, expected a multiple")
        matched = {r: shape for r in ranks if (shape := matched_shape(modules, r, nblocks))}
        if "bd" in methods:
            by_suffix = {
                f"{m}r": {r: shape for r in ranks if (shape := _closest(nblocks, m * r, attrgetter("rank")))}
                for m in sorted(multiples)
            }
            systems += _trained(nblocks, matched, by_suffix, inits)
        for method in [method for method in CONVERSIONS if method in methods]:
            label, family = f"LoRA converted to {nblocks} blocks, {method}", f"converted, {method}, {nblocks} blocks"
            systems.append(System(f"{method}-{nblocks}", label, "conversion", family, method, inits[0], matched))
    return [system for system in systems if system.shapes]


def _trained(nblocks: int, matched: Shapes, by_suffix: dict[str, Shapes], inits: Sequence[Init]) -> list[System]:
    name, family = f"bd{nblocks}", f"BD-LoRA, {nblocks} blocks"
    main = next((suffix for suffix, shapes in by_suffix.items() if shapes == matched), "matched")
    if main == "matched":
        by_suffix = {main: matched, **by_suffix}
    labels = {s: f"{family}, matched rank" if s == "matched" else f"{family}, rank {s}" for s in by_suffix}
    systems = [
        System(f"{name}-{suffix}", labels[suffix], "BD-LoRA", family, "bd", inits[0], shapes)
        for suffix, shapes in by_suffix.items()
    ]
    for init in inits[1:]:
        own, label = f"{family}, {init} initial values", f"{labels[main]}, {init} initial values"
        systems.append(System(f"{name}-{main}-{init}", label, "initial values", own, "bd", init, matched))
    return systems
