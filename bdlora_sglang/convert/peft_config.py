"""The converted adapter's ``adapter_config.json``: other ranks and blocks, the same scaling, all other fields kept."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from bdlora_sglang.adapter import AdapterConfig, BlockSide
from bdlora_sglang.convert.sides import side_patterns


@dataclass(frozen=True)
class NewModule:
    """What the new config must say of a module: its block side, its whole rank, and the scaling it had before."""

    side: BlockSide
    rank: int
    scaling: float


def exact_alpha(scaling: float, rank: int, use_rslora: bool) -> float:
    """The ``alpha`` for which PEFT's scaling, ``alpha / rank`` or ``alpha / sqrt(rank)``, is exactly ``scaling``.

    PEFT divides in float64. Where no float64 gives exactly ``scaling`` (it happens for some ranks that are not a power
    of two times the source's), the result is the closest, one unit of 2^-53 off. An integer where there is one.
    """
    divisor = math.sqrt(rank) if use_rslora else float(rank)
    middle = float(Fraction(scaling) * Fraction(divisor))
    candidates = [
        middle,
        math.nextafter(middle, math.inf),
        math.nextafter(middle, -math.inf),
    ]
    if abs(middle) < 2**53:
        candidates.insert(0, float(round(middle)))
    exact = [alpha for alpha in candidates if alpha / divisor == scaling]
    alpha = exact[0] if exact else middle
    return int(alpha) if alpha.is_integer() else alpha


def new_config(
    config: AdapterConfig,
    modules: Mapping[str, NewModule],
    nblocks: int,
    match_strict: bool = True,
) -> dict[str, Any]:
    """``adapter_config.json`` of the converted adapter.

    ``r`` and ``lora_alpha`` are those of most modules, ``rank_pattern`` and ``alpha_pattern`` say the rest.

    Args:
        config: the source's.
        modules: every module of the new adapter.
        nblocks: of the modules with a block side; 1 writes a plain LoRA.
        match_strict: whether modules without a side are an error for PEFT; forced off when there are some.
    """
    ranks = {name: module.rank for name, module in modules.items()}
    alphas = {name: exact_alpha(m.scaling, m.rank, config.use_rslora) for name, m in modules.items()}
    r, rank_pattern = _default_and_pattern(ranks)
    lora_alpha, alpha_pattern = _default_and_pattern(alphas)
    new: dict[str, Any] = {
        **config.raw,
        "r": r,
        "lora_alpha": lora_alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    }
    if nblocks == 1:
        new["use_bdlora"] = None
        return new
    sides = {name: module.side for name, module in modules.items()}
    bd_a, bd_b = side_patterns(sides)
    new["use_bdlora"] = {
        "target_modules_bd_a": bd_a,
        "target_modules_bd_b": bd_b,
        "nblocks": nblocks,
        "match_strict": match_strict and BlockSide.NONE not in sides.values(),
    }
    return new


def _default_and_pattern(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """The value of most modules (the largest of these), and patterns for the modules that have another one.

    PEFT takes the first pattern that matches the end of a module's name. One pattern for all modules of a last name
    part where these agree, else the full names; longer ones first, so that none hides another.
    """
    counts = Counter(values.values())
    default = max(counts, key=lambda value: (counts[value], value))
    by_leaf: dict[str, set[float]] = {}
    for name, value in values.items():
        by_leaf.setdefault(name.rpartition(".")[2], set()).add(value)
    pattern: dict[str, float] = {}
    for name, value in values.items():
        leaf = name.rpartition(".")[2]
        if len(by_leaf[leaf]) > 1:
            # Modules of the default value are listed too where a name that is the end of theirs has another value.
            if value != default or any(name.endswith(f".{other}") and values[other] != value for other in values):
                pattern[_escape(name)] = value
        elif value != default:
            pattern[_escape(leaf)] = value
    return default, dict(sorted(pattern.items(), key=lambda item: (-item[0].count("."), item[0])))


def _escape(name: str) -> str:
    """The pattern that matches just this name. Dots stay readable: one in place of another character is no module."""
    return name if re.fullmatch(r"[\w.]+", name) else re.escape(name)
