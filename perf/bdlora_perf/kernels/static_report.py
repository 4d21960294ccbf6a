"""The report of `bdlora_perf.kernels.static`: a model's times, verdicts with their resolution, and all launches.

One sample a batch, rank and system holds the sum over the four layers that have LoRA; ``launches.csv`` has one row a
layer, batch, rank and system.
"""

import itertools
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from bdlora_perf.kernels.latency import CONSTANTS, KNOWN, Figures, ranges_in_words, source_rows
from bdlora_perf.kernels.results import label
from bdlora_perf.kernels.shapes import LAYERS, Case
from bdlora_perf.kernels.static import MATCHED, TP, Row
from bdlora_perf.report.run import Run
from bdlora_perf.report.schema import Metric, Report, Sample, System, Value, write_atomically

METRICS = {
    "time_us": Metric(label="Model: LoRA of a decoder layer, as it is served", unit="us", better="lower"),
    "serial_us": Metric(label="Model: the same behind the base layers' products", unit="us", better="lower"),
    "requested": Metric(label="Bytes requested over bytes needed", unit="", better="lower"),
}
OURS, RIVAL = "bdlora", "triton_v2"
MOST_LISTED = 12
_BATCH = ["model", "phase", "tokens", "adapters", "rank"]
_SUMMED = ["served_us", "serial_us", "requested", "needed"]
_LAUNCHES = ["programs", "registers", "spills", "shared", "resident", "waves", "loads", "us", "bound"]
_LAUNCHES_CSV = [
    *("model", "layer", "phase", "tokens", "adapters", "rank", "system", "overlap"),
    *("served_us", "serial_us", "needed_kb", "requested_kb", *_LAUNCHES),
]


def frame_of(rows: Iterable[Row]) -> pd.DataFrame:
    """The rows with the columns of ``launches.csv``, in which figures of launches, in order, are joined by "+"."""
    frame = pd.DataFrame(rows)
    for name in _LAUNCHES:
        frame[name] = ["+".join(_short(launch[name]) for launch in launches) for launches in frame.kernels]
    kilobytes = {"needed_kb": frame.needed // 1000, "requested_kb": frame.requested // 1000}
    return frame.assign(overlap=frame.overlap.astype(int), **kilobytes)


def _short(value: str | int | float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def make_report(run: Run, frame: pd.DataFrame, capability: int, measured: Report | None = None) -> Report:
    """The report of a sweep on one architecture, or of the model beside the times of a GPU's report.

    Args:
        frame: `frame_of` the sweep, or of the cases of `measured_times`.
    """
    architecture = KNOWN[capability]
    systems = {
        name: System(label=label(name), details=_details(own)) for name, own in frame.groupby("system", sort=False)
    }
    report = Report(
        kind="kernels-static",
        title=f"LoRA kernels on sm_{capability} ({architecture.gpu.label}): machine code and a latency model",
        estimate=True,
        **run.head(),
        settings={"architecture": f"sm_{capability}", "tp": TP, **source_rows(architecture)},
        systems=systems,
        metrics=METRICS,
        baselines=tuple(name for name in ("triton_v2", MATCHED, "csgmv", "triton") if name in systems),
        samples=tuple(_samples(frame)),
        notes=tuple(_notes(frame)),
    )
    return report if measured is None else _beside(measured, report, frame)


def _details(own: pd.DataFrame) -> dict[str, Value]:
    kernels = pd.DataFrame(itertools.chain.from_iterable(own.kernels))
    return {
        "rank": "local rank" if own.system.iloc[0] != MATCHED else "4 times the local rank",
        "launches a layer": " or ".join(sorted({str(len(launches)) for launches in own.kernels})),
        "shrink beside the base product": f"{own.overlap.sum()} of {len(own)} cases",
        "registers": f"{kernels.registers.min()} to {kernels.registers.max()}",
        "launches that spill": int((kernels.spills > 0).sum()),
        "dependent loads before a product": " or ".join(sorted(set(kernels.loads.astype(str)))),
        "binaries": len(kernels.drop_duplicates(["kernel", "registers", "shared"])),
    }


def _samples(frame: pd.DataFrame) -> Iterator[Sample]:
    layers = frame.groupby(["system", *_BATCH], sort=False, as_index=False)[_SUMMED]
    # Added up in order: pandas's own sum corrects its roundings, and halves of the last digit would go another way.
    sums = layers.agg(lambda column: sum(column.tolist()))
    sums = sums.assign(time_us=sums.served_us, requested=sums.requested / sums.needed)
    for row in sums.to_dict("records"):
        point, metrics = {name: row[name] for name in _BATCH}, {name: round(row[name], 2) for name in METRICS}
        yield Sample(system=row["system"], point=point, round=0, metrics=metrics)


def verdict(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Whether we are "ahead", "behind" or in a "tie": it turns round within the ranges, or is less than one read of L2.

    Args:
        ours: microseconds at the nominal constants, then at each corner of their ranges; so are ``theirs``.
    """
    differences = [b - a for a, b in zip(ours, theirs, strict=True)]
    if abs(differences[0]) <= CONSTANTS.l2 or min(differences) <= 0 <= max(differences):
        return "tie"
    return "ahead" if differences[0] > 0 else "behind"


def _pairs(frame: pd.DataFrame, rival: str) -> pd.DataFrame:
    """Our rows beside the rival's, how many times as fast we are, and the verdict."""
    ours, theirs = (frame[frame.system == name] for name in (OURS, rival))
    pairs = ours.merge(theirs, on="case", suffixes=("", "_theirs"))
    verdicts = [verdict(*served) for served in zip(pairs.served, pairs.served_theirs, strict=True)]
    return pairs.assign(ratio=pairs.served_us_theirs / pairs.served_us, verdict=verdicts)


def _notes(frame: pd.DataFrame) -> Iterator[str]:
    yield (
        "A model: nothing is timed. Its resolution: an order that turns round within the ranges of its constants "
        f"({ranges_in_words()}), or a difference of less than one read of the second-level cache ({CONSTANTS.l2} us), "
        "is a tie."
    )
    for phase, pairs in _pairs(frame, RIVAL).groupby("phase"):
        yield _same_factors(pairs, phase)
        yield from _behind(pairs[pairs.verdict == "behind"])
    for phase, pairs in _pairs(frame, MATCHED).groupby("phase"):
        yield _matched(pairs, phase)
    yield "launches.csv: programs, registers, spills, shared memory, occupancy, waves, bytes and dependent loads."


def _same_factors(pairs: pd.DataFrame, phase: str) -> str:
    number = {word: (pairs.verdict == word).sum() for word in ("ahead", "tie", "behind")}
    counts = ", ".join(f"{word} in {count}" for word, count in number.items())
    met = "Behind in some cases" if number["behind"] else "Never behind"
    return (
        f"{phase}, the same factors, against triton_v2 as its runner serves it: {met} beyond the resolution. Of "
        f"{len(pairs)} layers and batches: {counts}. Geometric mean {stats.gmean(pairs.ratio):.2f} times as fast "
        f"({pairs.ratio.min():.2f} to {pairs.ratio.max():.2f})."
    )


def _behind(pairs: pd.DataFrame) -> Iterator[str]:
    """These cases, the worst first, and what bounds the kernels of both."""
    for row in pairs.sort_values("ratio", kind="stable").head(MOST_LISTED).itertuples():
        case, ours = row.case, _why(row.system, row.overlap, row.kernels)
        theirs = _why(row.system_theirs, row.overlap_theirs, row.kernels_theirs)
        yield (
            f"Behind: {case.model} {case.layer}, {case.phase}, {case.tokens} tokens, {case.adapters} adapters, rank "
            f"{case.rank}: {row.served_us:.2f} us against {row.served_us_theirs:.2f}. {ours}; {theirs}."
        )
    if len(pairs) > MOST_LISTED:
        counts = pairs.groupby(["layer", "rank"]).size().items()
        rest = ", ".join(f"{layer} rank {rank}: {count}" for (layer, rank), count in counts)
        yield f"Behind, all {len(pairs)} by layer and rank: {rest}."


def _why(system: str, overlap: int, kernels: Sequence[Figures]) -> str:
    parts = (f"{k['kernel']} {k['us']} us by {k['bound']}, {k['waves']} waves, {k['loads']} loads" for k in kernels)
    return f"{system}{' overlapped' if overlap else ''}: {', '.join(parts)}"


def _matched(pairs: pd.DataFrame, phase: str) -> str:
    mean, by_rank = stats.gmean(pairs.ratio), pairs.groupby("rank").ratio.agg(stats.gmean)
    corners = stats.gmean(np.array(pairs.served_theirs.tolist()) / np.array(pairs.served.tolist()))
    goal = f" The goal of 1.5 is {'met' if mean >= 1.5 else 'not met'}." if phase == "decode" else ""
    ranks = ", ".join(f"{rank}: {ratio:.2f}" for rank, ratio in by_rank.items())
    return (
        f"{phase}, matched quality (BD-LoRA of rank 2 r in {TP} blocks, against plain LoRA of rank r on triton_v2): "
        f"{mean:.2f} times as fast (geometric mean of {len(pairs)} layers and batches; {corners.min():.2f} to "
        f"{corners.max():.2f} within the ranges).{goal} By local rank: {ranks}."
    )


def write_launches(frame: pd.DataFrame, folder: Path) -> Path:
    """``launches.csv``: one row a case and system."""
    path = folder / "launches.csv"
    write_atomically(path, frame[_LAUNCHES_CSV].to_csv(index=False, float_format="%.2f", lineterminator="\n"))
    return path


def measured_times(measured: Report) -> dict[tuple[str, Case], float]:
    """Median microseconds of each system and case of a GPU's report (``bdlora perf kernels``).

    Of the cases that the model knows: layers without the base product.
    """
    times: dict[tuple[str, Case], list[float]] = defaultdict(list)
    for sample in measured.samples:
        if sample.point.get("layer") in LAYERS and "time_us" in sample.metrics:
            case = Case(**sample.point)  # type: ignore[arg-type]
            times[sample.system, case].append(sample.metrics["time_us"])
    return {key: statistics.median_high(found) for key, found in times.items()}


def _beside(measured: Report, report: Report, frame: pd.DataFrame) -> Report:
    """The model beside a measurement, layer by layer: each system behind the base layer's product, as it was timed."""
    times = measured_times(measured)
    found = [times.get(key) for key in zip(frame.system, frame.case, strict=True)]
    timed = frame.assign(time=found).dropna(subset="time")
    systems, notes = {}, []
    for name, own in timed.groupby("system", sort=False):
        systems[name] = System(label=f"{label(name)}: model")
        systems[f"{name}_measured"] = System(label=f"{label(name)}: measured")
        mean = stats.gmean(own.serial_us / own.time)
        rank = stats.spearmanr(own.serial_us, own.time).statistic if len(own) > 2 else float("nan")
        notes.append(
            f"{label(name)}: model over measurement {mean:.2f} (geometric mean of {len(own)} cases); rank "
            f"correlation {rank:.2f}."
        )
    samples = [
        Sample(system=name, point=row.case.point, round=0, metrics={"serial_us": round(us, 3)})
        for row in timed.itertuples()
        for name, us in ((row.system, row.serial_us), (f"{row.system}_measured", row.time))
    ]
    return report.model_copy(
        update={
            "title": f"{report.title}, beside a measurement",
            "samples": tuple(samples),
            "systems": systems,
            "baselines": tuple(systems)[1:2],
            "notes": (*notes, *report.notes),
            "settings": {**report.settings, "measured": measured.settings.get("gpu", ", ".join(measured.machine.gpus))},
        }
    )
