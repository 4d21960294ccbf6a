"""A feature of SGLang that meets LoRA: how one sees that it is asked for, and whether it is served."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from sglang.srt.environ import envs
from sglang.srt.runtime_context import get_platform

from bdlora_sglang.errors import BDLoRAError


class Status(Enum):
    SERVED = "served"
    NEEDS_GPU = "needs a GPU"  # for SGLang's own kernels; refused before the start on the CPU
    REFUSED = "refused"


@dataclass(frozen=True)
class Feature:
    """One feature of SGLang.

    A name in ``off`` and ``on`` is a field of ``ServerArgs``, an environment variable (in capitals), or a property of
    SGLang's platform (``is_hip``).

    Attributes:
        name: as the README calls it.
        status: what becomes of a server that asks for it.
        why: the reason, where it is not served everywhere; else what one may want to know.
        test: the test that serves it, or that sees it refused; in ``tests/serving``.
        off: values by name; any other value asks for the feature.
        on: the values that ask for it, by name.
        requests: the endpoints, for a feature that no argument asks for.
        without_lora: refused on a server without LoRA, too.
    """

    name: str
    status: Status
    test: str
    why: str = ""
    off: Mapping[str, object] = field(default_factory=dict)
    on: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    requests: str = ""
    without_lora: bool = False

    def asked(self, resolved: Any) -> Iterator[tuple[str, object, object]]:
        """Flag, value found and value expected, for each argument of ``resolved`` that asks for the feature."""
        for name, expected in self.off.items():
            found = _value(resolved, name)
            if found not in (None, False, expected):
                yield flag(name), found, "it off" if expected is False else expected
        for name, values in self.on.items():
            found = _value(resolved, name)
            if found in values:
                yield flag(name), found, "another or none"

    @property
    def asked_by(self) -> str:
        """How a user asks for it, for the README."""
        values = [f"`{flag(name)} {'`, `'.join(map(str, values))}`" for name, values in self.on.items()]
        names = [f"`{flag(name)}`" for name in self.off if not name.startswith("is_")]
        return ", ".join([*names, *values]) or self.requests


def flag(name: str) -> str:
    """A field of ``ServerArgs`` as a flag; what is none as it is."""
    if name.isupper() or name.startswith("is_"):
        return {"is_hip": "ROCm"}.get(name, name)
    return "--" + name.replace("_", "-")


def _value(resolved: Any, name: str) -> object:
    if name.isupper():
        return getattr(envs, name).get()
    return getattr(get_platform() if name.startswith("is_") else resolved, name)


def check_features(features: Iterable[Feature], resolved: Any, with_lora: bool, on_cpu: bool) -> None:
    """Raise `BDLoRAError` that names everything which ``resolved`` asks for and that is not served.

    Args:
        features: see `features.FEATURES`.
        resolved: SGLang's ``resolving_view`` of the resolved server arguments.
        with_lora: whether the server serves adapters.
        on_cpu: whether it runs on the CPU platform.
    """
    faults = [
        f"{flag}: found {found}, expected {expected}: {feature.why}"
        for feature in features
        if feature.status is Status.REFUSED or (feature.status is Status.NEEDS_GPU and on_cpu)
        if with_lora or feature.without_lora or feature.status is Status.NEEDS_GPU
        for flag, found, expected in feature.asked(resolved)
    ]
    if faults:
        raise BDLoRAError("\n".join(faults))


def markdown_table(features: Sequence[Feature]) -> str:
    """The table of the README: first what is served."""
    rows = [
        f"| {feature.name} | {feature.asked_by} | {feature.status.value}{': ' * bool(feature.why)}{feature.why} |"
        for status in Status
        for feature in features
        if feature.status is status
    ]
    return "\n".join(["| feature of SGLang | asked for by | |", "| --- | --- | --- |", *rows]) + "\n"
