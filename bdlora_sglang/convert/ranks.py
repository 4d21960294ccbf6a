"""The block rank of every module, from the options and, where they ask for it, from the modules' spectra."""

from collections.abc import Mapping
from pathlib import Path

import torch

from bdlora_sglang.adapter import LoRAModule
from bdlora_sglang.convert import allocation
from bdlora_sglang.convert.moments import Moments
from bdlora_sglang.convert.options import ConvertOptions
from bdlora_sglang.convert.plan import Plan, Steps, in_order
from bdlora_sglang.convert.truncate import energies
from bdlora_sglang.errors import BDLoRAError


def needs_spectra(options: ConvertOptions) -> bool:
    return options.choice.max_error is not None or options.plot is not None


def choose_ranks(
    plan: Plan, options: ConvertOptions, moments: Moments | None, steps: Steps
) -> Mapping[str, int] | None:
    """The block rank of every converted module; None for an exact conversion. Draws the plot where one is asked for.

    Raises:
        BDLoRAError: no module to approximate, or a budget that is too small.
    """
    costs = plan.costs()
    if not options.choice.exact and not costs:
        raise BDLoRAError(f"{plan.adapter.config.source}: found no module with a side, expected one to approximate")
    if not needs_spectra(options):
        return _without_spectra(plan, options, costs)
    spectra = _spectra(plan, options, moments, costs, steps)
    ranks = _with_spectra(plan, options, costs, spectra)
    if options.plot is not None:
        from bdlora_sglang.convert.plot import draw_error_against_parameters

        draw_error_against_parameters(
            Path(options.plot),
            plan,
            costs,
            spectra,
            ranks,
            calibrated=moments is not None,
        )
    return ranks


def _without_spectra(
    plan: Plan, options: ConvertOptions, costs: Mapping[str, allocation.ModuleCost]
) -> Mapping[str, int] | None:
    """One rank for all modules."""
    choice = options.choice
    if choice.rank is not None:
        return allocation.uniform(costs, choice.rank // plan.nblocks)
    if choice.param_ratio is not None:
        return allocation.uniform_within(costs, _budget(plan, choice.param_ratio))
    return None


def _with_spectra(
    plan: Plan,
    options: ConvertOptions,
    costs: Mapping[str, allocation.ModuleCost],
    spectra: Mapping[str, torch.Tensor],
) -> Mapping[str, int] | None:
    choice = options.choice
    if choice.max_error is None:
        return _without_spectra(plan, options, costs)
    enough = allocation.within_error(spectra, choice.max_error)
    if choice.rank is not None:
        budget: float = allocation.spent(costs, allocation.uniform(costs, choice.rank // plan.nblocks))
    elif choice.param_ratio is not None:
        budget = _budget(plan, choice.param_ratio)
    else:
        return enough
    return allocation.greedy(costs, spectra, budget, enough)


def _budget(plan: Plan, param_ratio: float) -> float:
    """Parameters for the converted modules; those that stay plain have theirs already."""
    return (param_ratio + allocation.RATIO_ROUNDING) * plan.adapter.num_parameters - plan.plain_parameters


def _spectra(
    plan: Plan,
    options: ConvertOptions,
    moments: Moments | None,
    costs: Mapping[str, allocation.ModuleCost],
    steps: Steps,
) -> dict[str, torch.Tensor]:
    """Per module, the squared error that each block rank takes away, scaling included; as long as its exact rank."""

    def energy(module: LoRAModule) -> torch.Tensor:
        blocks = plan.for_computing(plan.read(module))
        own = None if moments is None else moments.of(module.name, plan.compute_dtype, plan.device)
        values = energies(blocks, plan.sides[module.name], own) * module.scaling**2
        padded = values.new_zeros(costs[module.name].exact_rank)
        padded[: len(values)] = values
        return padded

    return {module.name: energy for module, energy in in_order(energy, plan.converted, options.threads, steps)}
