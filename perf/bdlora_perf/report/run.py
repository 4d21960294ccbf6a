"""A measurement under way: when it began, what there is so far, and how it ended."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from bdlora_perf.report.machine import describe_machine
from bdlora_perf.report.schema import Failure, Report, Sample
from bdlora_perf.server_process import terminated_as_interrupted
from bdlora_sglang.errors import BDLoRAError

_INTERRUPTED = "Interrupted: "


@dataclass
class Run:
    """What a report is made of; ``command`` is what the user typed."""

    command: str
    seed: int
    samples: list[Sample] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    interrupted: bool = False
    _started: datetime = field(default_factory=lambda: datetime.now(timezone.utc))
    _clock: float = field(default_factory=time.monotonic)

    @contextmanager
    def kept_when_interrupted(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the context, and what is measured stays.

        Raises:
            BDLoRAError: at the end nothing at all is measured.
        """
        try:
            with terminated_as_interrupted():
                yield
        except KeyboardInterrupt:
            self.interrupted = True
        if not self.samples:
            reasons = [f"{failure.system}: {failure.message}\n{failure.log_tail}" for failure in self.failures]
            raise BDLoRAError(f"found nothing to report, expected a turn at least: {(*reasons, 'interrupted')[0]}")

    def add(self, record: Sample | Failure) -> None:
        if isinstance(record, Failure):
            self.failures.append(record)
        else:
            self.samples.append(record)

    def head(self) -> dict[str, Any]:
        """Fields of a `Report` that say when, how and on what it was measured."""
        return {
            "command": self.command,
            "seed": self.seed,
            "started": self._started.isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - self._clock, 1),
            "machine": describe_machine(),
        }

    def broken_off(self, total: int, done: int | None = None) -> list[str]:
        """The note of a run that was interrupted after ``done`` (by default: its samples) of ``total`` turns."""
        done = len(self.samples) if done is None else done
        return [f"{_INTERRUPTED}{done} of {total} turns are in this report."] if self.interrupted else []


def was_interrupted(report: Report) -> bool:
    return any(note.startswith(_INTERRUPTED) for note in report.notes)
