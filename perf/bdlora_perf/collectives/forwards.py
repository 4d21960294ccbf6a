"""Forward passes in a rank's trace: what each of them sent, and where its time went."""

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bdlora_perf.collectives.count import Collective, collective_of

# SGLang marks each forward pass in the trace: "step[EXTEND bs=4 toks=16]", "step[DECODE bs=4]".
_STEP = re.compile(r"step\[(EXTEND|DECODE) ")
_PHASES = {"EXTEND": "prefill", "DECODE": "decode"}

# Events that do not contain one another, by the part of a forward's time that they are. The collectives' are those of
# the thread that runs them; the model waits for each.
_PARTS = {
    "bdlora::all_reduce": "collectives",
    "bdlora::all_gather": "collectives",
    "gloo:all_reduce": "collectives",
    "gloo:all_gather": "collectives",
    "aten::mm": "products",
    "aten::addmm": "products",
    "aten::addmm_": "products",
    "aten::bmm": "products",
    "aten::scaled_dot_product_attention": "attention",
}
PARTS = ("collectives", "products", "attention", "other")


@dataclass
class Forward:
    """One forward pass on one rank; ``parts`` of `PARTS` add up to ``milliseconds``."""

    phase: str
    milliseconds: float
    collectives: Counter[Collective] = field(default_factory=Counter)
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))


def forwards(events: Sequence[Mapping[str, Any]]) -> list[Forward]:
    """The forward passes of a trace in order of time."""
    steps = sorted((e["ts"], e["dur"], match[1]) for e in events if (match := _STEP.match(e.get("name", ""))))
    found = [Forward(_PHASES[kind], duration / 1000) for _, duration, kind in steps]
    starts = [start for start, _, _ in steps]
    for event in events:
        part, collective = _PARTS.get(event.get("name", "")), collective_of(event)
        if part is None and collective is None:
            continue
        index = bisect_right(starts, event["ts"]) - 1
        if index < 0 or event["ts"] > starts[index] + steps[index][1]:
            continue
        if part is not None:
            found[index].parts[part] += event["dur"] / 1000
        if collective is not None:
            found[index].collectives[collective] += 1
    for forward in found:
        forward.parts["other"] = forward.milliseconds - sum(forward.parts.values())
    return found
