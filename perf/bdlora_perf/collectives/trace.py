"""The traces of PyTorch's profiler that SGLang writes, one file a rank."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

_TRACE_RANK = re.compile(r"TP-(\d+)")


def read_traces(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """The events of all traces in ``folder``, by TP rank.

    Raises:
        ValueError: there is no trace of a TP rank in the folder.
    """
    traces: dict[int, list[dict[str, Any]]] = {}
    for path in sorted(folder.rglob("*.trace.json*")):
        match = _TRACE_RANK.search(path.name)
        if match is not None:
            opener = gzip.open if path.suffix == ".gz" else open
            with opener(path, "rt", encoding="utf-8") as file:
                traces.setdefault(int(match[1]), []).extend(json.load(file)["traceEvents"])
    if not traces:
        raise ValueError(f"{folder}: found no trace of a TP rank, expected *TP-<rank>*.trace.json(.gz)")
    return traces
