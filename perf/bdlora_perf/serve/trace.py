"""Requests of a recorded trace, to be replayed."""

import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from bdlora_sglang.errors import BDLoRAError


@dataclass(frozen=True)
class TracedRequest:
    """Lengths in tokens; ``at`` seconds after the first (None: at once), ``adapter`` by number (None: drawn)."""

    input_len: int
    output_len: int
    at: float | None
    adapter: int | None


class _Row(BaseModel):
    """Mooncake's fields, and those of our own for the same; ``timestamp`` in milliseconds."""

    model_config = ConfigDict(extra="ignore")

    input_len: int = Field(gt=0, validation_alias=AliasChoices("input_length", "input_len", "prompt_len"))
    output_len: int = Field(gt=0, validation_alias=AliasChoices("output_length", "output_len", "max_tokens"))
    timestamp: float | None = Field(default=None, ge=0)
    adapter: int | str | None = None


def read_trace(path: Path, speed: float = 1.0) -> tuple[TracedRequest, ...]:
    """Read JSON lines: Mooncake's traces (``timestamp``, ``input_length``, ``output_length``), or the same by hand.

    Args:
        speed: 2 replays in half the time.

    Raises:
        BDLoRAError: a line is none of these, or only some have a timestamp. Adapters that are named are numbered in
            the order in which they appear.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise BDLoRAError(f"--trace {path}: found {error.strerror}, expected a file of JSON lines") from error
    rows = [_read_row(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    timed = [row.timestamp for row in rows if row.timestamp is not None]
    if not rows or len(timed) not in (0, len(rows)):
        raise BDLoRAError(
            f"--trace {path}: found {len(timed)} timestamps in {len(rows)} requests, expected all or none"
        )
    rows.sort(key=lambda row: row.timestamp or 0)
    numbers = {name: i for i, name in enumerate(dict.fromkeys(r.adapter for r in rows if r.adapter is not None))}
    return tuple(
        TracedRequest(
            row.input_len,
            row.output_len,
            None if row.timestamp is None else (row.timestamp - timed_start) / 1000 / speed,
            None if row.adapter is None else numbers[row.adapter],
        )
        for timed_start in [min(timed, default=0.0)]
        for row in rows
    )


def _read_row(path: Path, number: int, line: str) -> _Row:
    try:
        return _Row.model_validate(json.loads(line))
    except (ValueError, ValidationError) as error:
        raise BDLoRAError(
            f"--trace {path}: line {number}: found {line[:80]!r}, expected JSON with input_length and "
            "output_length, as in Mooncake's traces"
        ) from error
