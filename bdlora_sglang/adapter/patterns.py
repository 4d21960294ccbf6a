"""The regular expressions of an adapter's config, under a time limit: a config comes from anywhere.

Source: ``peft.utils.other.get_pattern_key`` and ``match_target_against_key`` (PEFT 0.21), which use ``re``. The package
``regex`` matches the same and has a time limit, which ``re`` has not.
"""

import time
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

import regex

from bdlora_sglang.errors import AdapterError

# For all matches of one adapter; those of an ordinary one take milliseconds.
SECONDS = 5.0
MOST_EXPRESSIONS = 1_000
MOST_CHARACTERS = 10_000

_LITERAL = regex.compile(r"[\w.]+")
Value = TypeVar("Value")


class Matcher:
    """The expressions of one config: compiled once, limited in number and size, and all together in time."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._seconds_left = SECONDS
        self._compiled: dict[str, Any] = {}

    def check(self, field: str, expression: str) -> str:
        """``expression``, which stands in ``field``.

        Raises:
            AdapterError: no regular expression, or too long or one too many.
        """
        if len(expression) > MOST_CHARACTERS:
            found = f"a pattern of {len(expression)} characters"
            raise AdapterError(self._source, f"field '{field}'", found, f"at most {MOST_CHARACTERS}")
        if is_literal(expression):
            return expression
        try:
            self._compile(expression)
        except (regex.error, RecursionError, OverflowError) as error:
            expected = f"patterns that are regular expressions: {expression!r}: {error}"
            raise AdapterError(self._source, f"field '{field}'", repr(expression), expected) from error
        if len(self._compiled) > MOST_EXPRESSIONS:
            found = f"more than {MOST_EXPRESSIONS} regular expressions"
            raise AdapterError(self._source, f"field '{field}'", found, "fewer, or names of modules")
        return expression

    def fullmatch(self, expression: str, name: str) -> Any:
        """As ``re.fullmatch``; raises `AdapterError` when the config's time is up."""
        return self._timed(expression, name, "fullmatch")

    def match(self, expression: str, name: str) -> Any:
        """As ``re.match``; raises `AdapterError` when the config's time is up."""
        return self._timed(expression, name, "match")

    def _timed(self, expression: str, name: str, how: str) -> Any:
        compiled = self._compile(expression)
        start = time.monotonic()
        try:
            return getattr(compiled, how)(name, timeout=max(self._seconds_left, 1e-3))
        except TimeoutError:
            found = f"a pattern that takes longer than {SECONDS:g} seconds: {expression!r}"
            raise AdapterError(self._source, f"module '{name}'", found, "one without nested repetition") from None
        finally:
            self._seconds_left -= time.monotonic() - start

    def _compile(self, expression: str) -> Any:
        if expression not in self._compiled:
            self._compiled[expression] = regex.compile(expression)
        return self._compiled[expression]


class PatternTable(Generic[Value]):
    """``rank_pattern`` or ``alpha_pattern``: the first key that matches the end of a module's name gives the value.

    Most keys are names. These are looked up, not matched one by one: an adapter may have thousands of each.
    """

    def __init__(self, values: Mapping[str, Value], matcher: Matcher) -> None:
        self._values, self._matcher = list(values.values()), matcher
        self._expressions = [(index, rf"(.*\.)?({key})$") for index, key in enumerate(values) if not is_literal(key)]
        # A dot matches any character, so names are compared but for their dots.
        self._names: dict[tuple[int, ...], dict[str, int]] = {}
        for index, key in enumerate(values):
            if is_literal(key):
                dots = tuple(place for place, character in enumerate(key) if character == ".")
                self._names.setdefault((len(key), *dots), {}).setdefault(key, index)

    def get(self, module: str, default: Value) -> Value:
        """The value for ``module``; raises `AdapterError` when the config's time is up."""
        named = min(self._matching_names(module), default=len(self._values))
        for index, expression in self._expressions:
            if index > named:
                break
            if self._matcher.match(expression, module):
                return self._values[index]
        return self._values[named] if named < len(self._values) else default

    def _matching_names(self, module: str) -> Iterator[int]:
        starts = [0, *(place + 1 for place, character in enumerate(module) if character == ".")]
        by_length = {len(module) - start: module[start:] for start in starts}
        for (length, *dots), names in self._names.items():
            if length in by_length:
                characters = list(by_length[length])
                for dot in dots:
                    characters[dot] = "."
                index = names.get("".join(characters))
                if index is not None:
                    yield index


def is_literal(expression: str) -> bool:
    """Whether an expression is a module's name, or the end of one."""
    return _LITERAL.fullmatch(expression) is not None
