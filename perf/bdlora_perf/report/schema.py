"""``report.json``: what was measured, on what, how, and every raw figure. All other pages are worked out from it."""

import os
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bdlora_sglang.errors import BDLoRAError

SCHEMA_VERSION: Final = 1

Kind = Literal["serve", "collectives", "kernels", "kernels-static", "estimate", "engine", "swap", "quality", "convert"]
Value = str | int | float | bool | None
# Where in a sweep a figure was measured: the value of each dimension.
Point = dict[str, Value]


class _Record(BaseModel):
    # JSON has no NaN or infinity: they would be written as null, and such a report could not be read again.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Machine(_Record):
    """What the figures were measured on; ``versions`` by package."""

    processor: str
    cores: int
    memory_gib: float
    gpus: tuple[str, ...] = ()
    system: str
    versions: dict[str, str]


class Metric(_Record):
    """A measured quantity. ``better`` is None where neither direction is (a count, a size that is what it is)."""

    label: str
    unit: str
    better: Literal["higher", "lower"] | None = None


class System(_Record):
    """One contender. ``details`` says exactly what ran: flags, adapters, ranks, parameters, bytes of memory."""

    label: str
    details: dict[str, Value] = {}


class Sample(_Record):
    """One measurement: a system at a point of the sweep, in one round.

    Samples of one ``round`` at one ``point`` were taken one after the other: ratios are formed between them.
    """

    system: str
    point: Point
    round: int
    metrics: dict[str, float]


class Failure(_Record):
    """A part of the sweep that could not be measured, and the end of the log that says why."""

    system: str
    point: Point = {}
    message: str
    log_tail: str = ""


class Report(_Record):
    """A whole report. ``systems`` and ``metrics`` by name, in the order in which they are shown.

    ``estimate`` is true where the figures come from a model and nothing was measured: every page then says so.
    ``settings`` are those that all systems share; ``baselines`` the systems that the others are compared with.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    kind: Kind
    title: str
    estimate: bool = False
    command: str
    started: str = Field(description="ISO 8601, UTC")
    seconds: float
    seed: int
    machine: Machine
    settings: dict[str, Value]
    systems: dict[str, System]
    metrics: dict[str, Metric]
    baselines: tuple[str, ...] = ()
    samples: tuple[Sample, ...]
    failures: tuple[Failure, ...] = ()
    notes: tuple[str, ...] = ()


def load_report(path: Path) -> Report:
    """Read a ``report.json``, or the one in the folder ``path``; raises `BDLoRAError` for anything else."""
    file = path / "report.json" if path.is_dir() else path
    try:
        return Report.model_validate_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BDLoRAError(f"{file}: found {error.strerror}, expected a report of bdlora perf") from error
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"])) or "the file"
        raise BDLoRAError(
            f"{file}: {where}: found {str(problem['input'])[:80]!r}, expected a report of bdlora perf with schema "
            f"version {SCHEMA_VERSION} ({problem['msg']})"
        ) from error


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` to a temporary name beside ``path`` and rename it, so that nobody sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise BDLoRAError(f"{path}: found {error.strerror}, expected to be able to write the report") from error
    finally:
        temporary.unlink(missing_ok=True)


def save_report(report: Report, folder: Path) -> Path:
    """Write ``folder/report.json`` and return its path; raises `BDLoRAError` where it cannot be written."""
    path = folder / "report.json"
    write_atomically(path, report.model_dump_json(indent=1) + "\n")
    return path
