"""The report of `bdlora_perf.kernels.static`: a model's times, verdicts with their resolution, and all launches.

One sample a batch, rank and system holds the sum over the four layers that have LoRA; ``launches.csv`` has one row a
layer, batch, rank and system.
"""

import csv
import io
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import geometric_mean

from scipy import stats

from bdlora_perf.kernels.latency import CONSTANTS, KNOWN, RANGES, source_rows
from bdlora_perf.kernels.results import LABELS
from bdlora_perf.kernels.results import MATCHED as MATCHED_LABELS
from bdlora_perf.kernels.shapes import LAYERS, Case
from bdlora_perf.kernels.static import MATCHED, TP, Row
from bdlora_perf.report.run import Run
from bdlora_perf.report.schema import Metric, Point, Report, Sample, System, Value, write_atomically

METRICS = {
    "time_us": Metric(label="Model: LoRA of a decoder layer, as it is served", unit="us", better="lower"),
    "serial_us": Metric(label="Model: the same behind the base layers' products", unit="us", better="lower"),
    "requested": Metric(label="Bytes requested over bytes needed", unit="", better="lower"),
}
OURS, RIVAL = "bdlora", "triton_v2"
MOST_LISTED = 12
_COLUMNS = ("programs", "registers", "spills", "shared", "resident", "waves", "loads", "us", "bound")


def make_report(run: Run, rows: Sequence[Row], capability: int) -> Report:
    """The report of a sweep on one architecture."""
    architecture, names = KNOWN[capability], list(dict.fromkeys(row.system for row in rows))
    return Report(
        kind="kernels-static",
        title=f"LoRA kernels on sm_{capability} ({architecture.gpu.label}): machine code and a latency model",
        estimate=True,
        **run.head(),
        settings={"architecture": f"sm_{capability}", "tp": TP, **source_rows(architecture)},
        systems={name: System(label=label(name), details=_details(name, rows)) for name in names},
        metrics=METRICS,
        baselines=tuple(name for name in ("triton_v2", MATCHED, "csgmv", "triton") if name in names),
        samples=tuple(_samples(rows)),
        notes=tuple(_notes(rows)),
    )


def label(name: str) -> str:
    contender, _, suffix = name.rpartition("_")
    return f"{LABELS[contender]}, {MATCHED_LABELS[suffix]}" if suffix in MATCHED_LABELS else LABELS[name]


def _details(name: str, rows: Sequence[Row]) -> dict[str, Value]:
    own = [row for row in rows if row.system == name]
    kernels = [kernel for row in own for kernel in row.kernels]
    return {
        "rank": "local rank" if name != MATCHED else "4 times the local rank",
        "launches a layer": " or ".join(sorted({str(len(row.kernels)) for row in own})),
        "shrink beside the base product": f"{sum(row.overlap for row in own)} of {len(own)} cases",
        "registers": f"{min(int(k['registers']) for k in kernels)} to {max(int(k['registers']) for k in kernels)}",
        "launches that spill": sum(int(kernel["spills"]) > 0 for kernel in kernels),
        "dependent loads before a product": " or ".join(sorted({str(kernel["loads"]) for kernel in kernels})),
        "binaries": len({(k["kernel"], k["registers"], k["shared"]) for k in kernels}),
    }


def _batch(case: Case) -> Point:
    names = ("model", "phase", "tokens", "adapters", "rank")
    return {name: case.point[name] for name in names}


def _samples(rows: Iterable[Row]) -> Iterator[Sample]:
    groups: dict[tuple[object, ...], list[Row]] = defaultdict(list)
    for row in rows:
        key = (row.system, *_batch(row.case).values())
        groups[key].append(row)
    for own in groups.values():
        metrics = {
            "time_us": round(sum(row.served[0] for row in own), 2),
            "serial_us": round(sum(row.serial for row in own), 2),
            "requested": round(sum(row.requested for row in own) / sum(row.needed for row in own), 2),
        }
        yield Sample(system=own[0].system, point=_batch(own[0].case), round=0, metrics=metrics)


def verdict(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Whether we are "ahead", "behind" or in a "tie": it turns round within the ranges, or is less than one read of L2.

    Args:
        ours: microseconds at the nominal constants, then at each corner of their ranges; so are ``theirs``.
    """
    differences = [b - a for a, b in zip(ours, theirs, strict=True)]
    if abs(differences[0]) <= CONSTANTS.l2 or min(differences) <= 0 <= max(differences):
        return "tie"
    return "ahead" if differences[0] > 0 else "behind"


def _pairs(rows: Iterable[Row], rival: str, phase: str | None = None) -> list[tuple[Row, Row]]:
    by_case: dict[Case, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        by_case[row.case][row.system] = row
    return [
        (found[OURS], found[rival])
        for case, found in by_case.items()
        if OURS in found and rival in found and phase in (None, case.phase)
    ]


def _notes(rows: Sequence[Row]) -> Iterator[str]:
    ranges = ", ".join(f"{name} {low} to {high}" for name, (low, high) in RANGES.items())
    yield (
        "A model: nothing is timed. Its resolution: an order that turns round within the ranges of its constants "
        f"({ranges}), or a difference of less than one read of the second-level cache ({CONSTANTS.l2} us), is a tie."
    )
    for phase in ("decode", "prefill"):
        pairs = _pairs(rows, RIVAL, phase)
        if pairs:
            yield _same_factors(pairs, phase)
            yield from _behind(pairs)
    for phase in ("decode", "prefill"):
        pairs = _pairs(rows, MATCHED, phase)
        if pairs:
            yield _matched(pairs, phase)
    yield "launches.csv: programs, registers, spills, shared memory, occupancy, waves, bytes and dependent loads."


def _same_factors(pairs: Sequence[tuple[Row, Row]], phase: str) -> str:
    verdicts = [verdict(ours.served, theirs.served) for ours, theirs in pairs]
    ratios = [theirs.served[0] / ours.served[0] for ours, theirs in pairs]
    counts = ", ".join(f"{word} in {verdicts.count(word)}" for word in ("ahead", "tie", "behind"))
    met = "Never behind" if "behind" not in verdicts else "Behind in some cases"
    return (
        f"{phase}, the same factors, against triton_v2 as its runner serves it: {met} beyond the resolution. Of "
        f"{len(pairs)} layers and batches: {counts}. Geometric mean {geometric_mean(ratios):.2f} times as fast "
        f"({min(ratios):.2f} to {max(ratios):.2f})."
    )


def _behind(pairs: Sequence[tuple[Row, Row]]) -> Iterator[str]:
    """The cases that are behind, the worst first, and what bounds the last kernel of both."""
    found = [(ours, theirs) for ours, theirs in pairs if verdict(ours.served, theirs.served) == "behind"]
    found.sort(key=lambda pair: pair[1].served[0] / pair[0].served[0])
    for ours, theirs in found[:MOST_LISTED]:
        case = ours.case
        yield (
            f"Behind: {case.model} {case.layer}, {case.phase}, {case.tokens} tokens, {case.adapters} adapters, rank "
            f"{case.rank}: {ours.served[0]:.2f} us against {theirs.served[0]:.2f}. {_why(ours)}; {_why(theirs)}."
        )
    if len(found) > MOST_LISTED:
        by: dict[tuple[str, int], int] = defaultdict(int)
        for ours, _ in found:
            by[ours.case.layer, ours.case.rank] += 1
        rest = ", ".join(f"{layer} rank {rank}: {count}" for (layer, rank), count in sorted(by.items()))
        yield f"Behind, all {len(found)} by layer and rank: {rest}."


def _why(row: Row) -> str:
    parts = (f"{k['kernel']} {k['us']} us by {k['bound']}, {k['waves']} waves, {k['loads']} loads" for k in row.kernels)
    return f"{row.system}{' overlapped' if row.overlap else ''}: {', '.join(parts)}"


def _matched(pairs: Sequence[tuple[Row, Row]], phase: str) -> str:
    ratios = [theirs.served[0] / ours.served[0] for ours, theirs in pairs]
    mean = geometric_mean(ratios)
    by_rank = {
        rank: geometric_mean([t.served[0] / o.served[0] for o, t in pairs if o.case.rank == rank])
        for rank in sorted({ours.case.rank for ours, _ in pairs})
    }
    corner_means = [
        geometric_mean([theirs.served[i] / ours.served[i] for ours, theirs in pairs])
        for i in range(len(pairs[0][0].served))
    ]
    goal = f" The goal of 1.5 is {'met' if mean >= 1.5 else 'not met'}." if phase == "decode" else ""
    ranks = ", ".join(f"{rank}: {ratio:.2f}" for rank, ratio in by_rank.items())
    return (
        f"{phase}, matched quality (BD-LoRA of rank 2 r in {TP} blocks, against plain LoRA of rank r on triton_v2): "
        f"{mean:.2f} times as fast (geometric mean of {len(pairs)} layers and batches; {min(corner_means):.2f} to "
        f"{max(corner_means):.2f} within the ranges).{goal} By local rank: {ranks}."
    )


def launches_csv(rows: Iterable[Row]) -> str:
    """One row a case and system; figures of its launches, in order, are joined by "+"."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    head = ("model", "layer", "phase", "tokens", "adapters", "rank", "system", "overlap", "served_us", "serial_us")
    writer.writerow([*head, "needed_kb", "requested_kb", *_COLUMNS])
    for row in rows:
        case = row.case
        parts = ["+".join(_short(kernel[name]) for kernel in row.kernels) for name in _COLUMNS]
        where = (case.model, case.layer, case.phase, case.tokens, case.adapters, case.rank)
        figures = (f"{row.served[0]:.2f}", f"{row.serial:.2f}", row.needed // 1000, row.requested // 1000)
        writer.writerow([*where, row.system, int(row.overlap), *figures, *parts])
    return buffer.getvalue()


def _short(value: str | int | float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def write_launches(rows: Iterable[Row], folder: Path) -> Path:
    path = folder / "launches.csv"
    write_atomically(path, launches_csv(rows))
    return path


def measured_cases(measured: Report) -> list[Case]:
    """The cases of a GPU's report (``bdlora perf kernels``) that the model knows: layers without the base product."""
    points = {tuple(sorted(sample.point.items())): sample.point for sample in measured.samples}
    known = [point for point in points.values() if point.get("layer") in LAYERS]
    cases = [Case(**point) for point in known]  # type: ignore[arg-type]
    return sorted(cases, key=lambda case: (case.rank, case.model, case.layer, case.tp, case.phase, case.tokens))


def against_measurement(run: Run, rows: Sequence[Row], capability: int, measured: Report) -> Report:
    """The model beside a measurement, layer by layer: each system behind the base layer's product, as it was timed."""
    report = make_report(run, rows, capability)
    samples, ratios = [], defaultdict(list)
    medians: dict[tuple[str, tuple[object, ...]], list[float]] = defaultdict(list)
    for sample in measured.samples:
        if "time_us" in sample.metrics:
            medians[sample.system, tuple(sorted(sample.point.items()))].append(sample.metrics["time_us"])
    for row in rows:
        found = sorted(medians.get((row.system, tuple(sorted(row.case.point.items()))), ()))
        if found:
            time = found[len(found) // 2]
            ratios[row.system].append((row.serial, time))
            samples += [
                Sample(system=name, point={**row.case.point}, round=0, metrics={"serial_us": round(value, 3)})
                for name, value in ((row.system, row.serial), (f"{row.system}_measured", time))
            ]
    notes = []
    for system, pairs in ratios.items():
        mean = geometric_mean([model / time for model, time in pairs])
        rank = stats.spearmanr(*zip(*pairs, strict=True)).statistic if len(pairs) > 2 else float("nan")
        notes.append(f"{label(system)}: model over measurement {mean:.2f} (geometric mean of {len(pairs)} cases); rank "
                     f"correlation {rank:.2f}.")  # fmt: skip
    systems = {
        key: value
        for name in ratios
        for key, value in (
            (name, System(label=f"{label(name)}: model")),
            (f"{name}_measured", System(label=f"{label(name)}: measured")),
        )
    }
    return report.model_copy(
        update={
            "title": f"{report.title}, beside a measurement",
            "samples": tuple(samples),
            "systems": systems,
            "baselines": tuple(f"{name}_measured" for name in ratios)[:1],
            "notes": (*notes, *report.notes),
            "settings": {**report.settings, "measured": measured.settings.get("gpu", ", ".join(measured.machine.gpus))},
        }
    )
