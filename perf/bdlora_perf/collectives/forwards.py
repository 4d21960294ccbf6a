"""Forward passes in a rank's trace: what each of them sent, and where its time went."""

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from bdlora_perf.collectives.count import Collective, Event, collectives

# SGLang marks each forward pass in the trace: "step[EXTEND bs=4 toks=16]", "step[DECODE bs=4]".
_STEP = re.compile(r"step\[(EXTEND|DECODE) ")
_PHASES = {"EXTEND": "prefill", "DECODE": "decode"}
PHASES = tuple(_PHASES.values())

# Events that do not contain one another, by the part of a forward's time that they are.
_PARTS = {
    "aten::mm": "products",
    "aten::addmm": "products",
    "aten::addmm_": "products",
    "aten::bmm": "products",
    "aten::scaled_dot_product_attention": "attention",
}
# The time of a collective is that of the thread that runs it; the model waits for it.
_RUNS = {"gloo:all_reduce", "gloo:all_gather", "bdlora::all_reduce", "bdlora::all_gather"}
PARTS = ("collectives", "products", "attention", "other")


@dataclass
class Forward:
    """One forward pass on one rank; ``parts`` of `PARTS` add up to ``milliseconds``."""

    phase: str
    milliseconds: float
    collectives: Counter[Collective] = field(default_factory=Counter)
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))


def forwards(events: Sequence[Event]) -> list[Forward]:
    """The forward passes of a trace in order of time."""
    steps = sorted((e["ts"], e["dur"], match[1]) for e in events if (match := _STEP.match(e.get("name", ""))))
    found = [Forward(_PHASES[kind], duration / 1000) for _, duration, kind in steps]
    starts = [start for start, _, _ in steps]

    def forward_of(event: Event) -> Forward | None:
        index = bisect_right(starts, event["ts"]) - 1
        return found[index] if index >= 0 and event["ts"] <= starts[index] + steps[index][1] else None

    for event, collective in collectives(events):
        if (forward := forward_of(event)) is not None:
            forward.collectives[collective] += 1
            if collective.shape is None:
                forward.parts["collectives"] += event["dur"] / 1000
    for event in events:
        part = _PARTS.get(event.get("name", ""), "collectives" if event.get("name") in _RUNS else None)
        if part is not None and (forward := forward_of(event)) is not None:
            forward.parts[part] += event["dur"] / 1000
    for forward in found:
        forward.parts["other"] = forward.milliseconds - sum(forward.parts.values())
    return found
