"""The plot of error against parameters."""

from collections.abc import Mapping
from pathlib import Path

import torch

from bdlora_sglang.convert.allocation import ModuleCost, spent, tail_energies, uniform
from bdlora_sglang.convert.plan import Plan
from bdlora_sglang.errors import BDLoRAError

# Parameters of the paper's BD-LoRA adapters over those of the LoRA they are compared with (Llama-3.1-70B, 8 blocks).
PAPER_RATIOS = (0.87, 1.74)


def uniform_curve(
    costs: Mapping[str, ModuleCost], spectra: Mapping[str, torch.Tensor]
) -> tuple[list[int], list[float]]:
    """Parameters and relative error of the converted modules at every rank that is one for all."""
    ranks = range(1, max(cost.exact_rank for cost in costs.values()) + 1)
    choices = [uniform(costs, rank) for rank in ranks]
    return [spent(costs, choice) for choice in choices], [relative_error(spectra, choice) for choice in choices]


def greedy_curve(costs: Mapping[str, ModuleCost], spectra: Mapping[str, torch.Tensor]) -> tuple[list[int], list[float]]:
    """The same when each module's rank is chosen where a parameter lowers the error most, step by step."""
    steps = sorted(
        (-float(energy) / costs[name].parameters, name, float(energy))
        for name, spectrum in spectra.items()
        for energy in spectrum[1:]
    )
    parameters = [spent(costs, dict.fromkeys(costs, 1))]
    total = sum(float(spectrum.sum()) for spectrum in spectra.values())
    errors_sq = [total - sum(float(spectrum[0]) for spectrum in spectra.values())]
    for _, name, energy in steps:
        parameters.append(parameters[-1] + costs[name].parameters)
        errors_sq.append(errors_sq[-1] - energy)
    return parameters, [(max(error, 0) / total) ** 0.5 if total else 0.0 for error in errors_sq]


def relative_error(spectra: Mapping[str, torch.Tensor], ranks: Mapping[str, int]) -> float:
    """Of all modules together, at these block ranks."""
    error = sum(float(tail_energies(spectra[name])[rank]) for name, rank in ranks.items())
    total = sum(float(spectrum.sum()) for spectrum in spectra.values())
    return (error / total) ** 0.5 if total else 0.0


def draw_error_against_parameters(
    path: Path,
    plan: Plan,
    costs: Mapping[str, ModuleCost],
    spectra: Mapping[str, torch.Tensor],
    ranks: Mapping[str, int] | None,
    calibrated: bool,
) -> None:
    """Write the plot to ``path``; the kind of image follows from its suffix. No ``ranks``: a lossless conversion.

    Raises:
        BDLoRAError: matplotlib is missing, or it cannot write such a file.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BDLoRAError("--plot: found no matplotlib, expected it installed (pip install matplotlib)") from error
    source, fixed = plan.adapter.num_parameters, plan.plain_parameters
    chosen = ranks or uniform(costs, max(cost.exact_rank for cost in costs.values()))
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    for label, (parameters, errors), style in (
        ("one rank for all modules", uniform_curve(costs, spectra), "-"),
        ("rank by module (--max-error with a budget)", greedy_curve(costs, spectra), "--"),
    ):
        # Steps: a budget between two points buys the cheaper one.
        ratios = [(fixed + p) / source for p in parameters]
        axes.plot(ratios, errors, style, drawstyle="steps-post", linewidth=1.6, label=label)
    reached = relative_error(spectra, chosen)
    ratio = (fixed + spent(costs, chosen)) / source
    axes.plot(
        [ratio],
        [reached],
        "o",
        color="black",
        markersize=7,
        label=f"chosen: {ratio:.2f}, error {reached:.3f}",
    )
    axes.plot(
        [1],
        [0],
        "s",
        color="tab:red",
        markersize=7,
        label=f"the source, {source:,} parameters",
        clip_on=False,
    )
    for mark in PAPER_RATIOS:
        axes.axvline(mark, color="gray", linestyle=":", linewidth=1)
        axes.annotate(
            f"{mark}",
            (mark, 1),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="bottom",
            color="gray",
        )
    axes.set_xlabel("parameters, relative to the source (dotted: the paper's two ratios)")
    axes.set_ylabel("relative error " + ("on activations" if calibrated else "of the deltas (Frobenius)"))
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_title(f"{source:,} parameters as {plan.nblocks} blocks", pad=18, fontsize=10)
    axes.legend(fontsize=8)
    try:
        # No date and no random names in the file: the same input gives the same bytes.
        with rc_context({"svg.hashsalt": "bdlora"}):
            figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    except (ValueError, OSError) as failure:
        raise BDLoRAError(f"--plot: found '{path}' ({failure}), expected an image file to write") from failure
