"""Typed fields of a JSON object, with messages that name the field."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from bdlora_sglang.errors import AdapterError

Value = TypeVar("Value")


@dataclass(frozen=True)
class FieldReader:
    """Reads fields of ``raw``, which came from ``source``; each method raises `AdapterError` for another type."""

    raw: Mapping[str, Any]
    source: str
    prefix: str = ""

    def fail(self, name: str, expected: str) -> AdapterError:
        return AdapterError(self.source, f"field '{self.prefix}{name}'", repr(self.raw.get(name)), expected)

    def positive_int(self, name: str, default: int | None = None) -> int:
        value = self.raw.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.fail(name, "an integer of at least 1")
        return value

    def number(self, name: str) -> float:
        value = self.raw.get(name)
        try:
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise self.fail(name, "a finite number")
        except OverflowError:  # an integer beyond the range of float
            raise self.fail(name, "a finite number") from None
        return value

    def boolean(self, name: str, default: bool) -> bool:
        value = self.raw.get(name, default)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(name, "true or false")
        return value

    def strings(self, name: str) -> tuple[str, ...]:
        """A list of strings, or one string; none where the field is null, absent or empty."""
        value = self.raw.get(name)
        if value is None or value == "":
            return ()
        value = [value] if isinstance(value, str) else sorted(value) if isinstance(value, set) else value
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise self.fail(name, "a list of strings")
        return tuple(value)

    def integers(self, name: str) -> tuple[int, ...]:
        value = self.raw.get(name)
        if value is None:
            return ()
        value = [value] if isinstance(value, int) else value
        if not isinstance(value, list | tuple) or not all(isinstance(item, int) for item in value):
            raise self.fail(name, "an integer or a list of integers")
        return tuple(value)

    def mapping(self, name: str, read: Callable[["FieldReader", str], Value]) -> dict[str, Value]:
        """An object whose values ``read`` reads, in the order in which it has them."""
        value = self.raw.get(name) or {}
        if not isinstance(value, Mapping):
            raise self.fail(name, "an object")
        inner = FieldReader(value, self.source, prefix=f"{self.prefix}{name}.")
        return {key: read(inner, key) for key in value}
