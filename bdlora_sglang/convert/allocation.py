"""How much rank each module gets: one rank for all, or where it lowers the error most.

A module of N blocks stores ``N in + out`` numbers per block rank when it is column-parallel, ``in + N out`` when
row-parallel. Ranks here are those of one block; a module's whole rank is N times it.
"""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from bdlora_sglang.adapter import BlockSide, LoRAModule
from bdlora_sglang.convert.blocks import exact_block_rank
from bdlora_sglang.errors import BDLoRAError

# Ratios are quoted with two decimals: 0.87 stands for 0.8703 of Llama-3.1-70B (8 blocks, twice the rank).
RATIO_ROUNDING = 0.005


@dataclass(frozen=True)
class ModuleCost:
    """What one module may spend: ``parameters`` per rank of a block, and the block rank that is exact already."""

    parameters: int
    exact_rank: int


def module_cost(module: LoRAModule, side: BlockSide, nblocks: int) -> ModuleCost:
    exact, inputs, outputs = exact_block_rank(module, nblocks), module.in_features, module.out_features
    if side is BlockSide.B:
        return ModuleCost(nblocks * inputs + outputs, min(exact, inputs, outputs // nblocks))
    return ModuleCost(inputs + nblocks * outputs, min(exact, inputs // nblocks, outputs))


def spent(costs: Mapping[str, ModuleCost], ranks: Mapping[str, int]) -> int:
    """Parameters of all modules at these block ranks."""
    return sum(cost.parameters * ranks[name] for name, cost in costs.items())


def uniform(costs: Mapping[str, ModuleCost], rank: int) -> dict[str, int]:
    """Block rank ``rank`` for every module, or its exact rank where that is smaller."""
    return {name: min(rank, cost.exact_rank) for name, cost in costs.items()}


def uniform_within(costs: Mapping[str, ModuleCost], budget: float) -> dict[str, int]:
    """The largest uniform block rank whose parameters stay within ``budget``.

    Raises:
        BDLoRAError: even rank 1 needs more.
    """
    most = max(cost.exact_rank for cost in costs.values())
    fitting = [rank for rank in range(1, most + 1) if spent(costs, uniform(costs, rank)) <= budget]
    if not fitting:
        least = spent(costs, uniform(costs, 1))
        raise BDLoRAError(
            f"--param-ratio: found a budget of {int(budget):,} parameters for the converted modules, expected at least "
            f"{least:,}, which one rank a block takes"
        )
    return uniform(costs, fitting[-1])


def within_error(energies: Mapping[str, torch.Tensor], max_error: float) -> dict[str, int]:
    """The smallest block rank at which each module's own relative error is at most ``max_error``; at least 1."""
    return {name: _rank_for(energy, max_error) for name, energy in energies.items()}


def _rank_for(energy: torch.Tensor, max_error: float) -> int:
    tails = tail_energies(energy)
    within = tails <= max_error**2 * tails[0]
    return max(1, int(within.int().argmax()))


def tail_energies(energy: torch.Tensor) -> torch.Tensor:
    """``t[r]``: the squared error at rank r, for r from 0 to all ranks, float64."""
    tails = energy.double().flip(0).cumsum(0).flip(0)
    return torch.cat([tails, tails.new_zeros(1)])


def greedy(
    costs: Mapping[str, ModuleCost],
    energies: Mapping[str, torch.Tensor],
    budget: float,
    limits: Mapping[str, int],
) -> dict[str, int]:
    """Spend ``budget`` parameters, rank by rank, where a parameter lowers the summed squared error most.

    A module's energies fall with the rank, so the steps are taken in the order of their gain, and no other choice with
    the same parameters has a smaller error. A step that no longer fits is left out, a cheaper one may still fit.

    Args:
        costs: per module.
        energies: per module, in one unit for all (scaling included).
        budget: parameters of all modules together.
        limits: block ranks beyond which a module needs no more.

    Raises:
        BDLoRAError: one rank a block already needs more than the budget.
    """
    ranks = dict.fromkeys(costs, 1)
    left = budget - spent(costs, ranks)
    if left < 0:
        raise BDLoRAError(
            f"the budget for --max-error: found {int(budget):,} parameters, expected at least "
            f"{spent(costs, ranks):,}, which one rank a block takes"
        )
    steps = [_step(name, 1, costs, energies) for name in costs if limits[name] > 1]
    heapq.heapify(steps)
    while steps:
        _, name, rank = heapq.heappop(steps)
        if costs[name].parameters > left:
            continue
        ranks[name] = rank + 1
        left -= costs[name].parameters
        if ranks[name] < limits[name]:
            heapq.heappush(steps, _step(name, ranks[name], costs, energies))
    return ranks


def _step(
    name: str,
    rank: int,
    costs: Mapping[str, ModuleCost],
    energies: Mapping[str, torch.Tensor],
) -> tuple[float, str, int]:
    return -float(energies[name][rank]) / costs[name].parameters, name, rank
