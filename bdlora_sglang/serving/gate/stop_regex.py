"""``stop_regex``: patterns that the scheduler searches for after each token, while all other requests wait.

Python's ``re`` goes back and tries again, and no time limit stops it: what it may cost is bounded beforehand. The bound
counts the ways in which a pattern can match the beginning of a text, for each place where a match may start.
"""

import math
import re
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from sglang.srt.sampling.sampling_params import MAX_STOP_REGEX_COUNT, MAX_STOP_REGEX_LEN

from bdlora_sglang.serving.gate.errors import RequestError

# Python 3.11 renamed it.
sre_parse: Any = import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")

# Steps of a search: some seconds at the very worst, when the text is made for it.
MAX_STEPS = 1e9

_REPEATS = {sre_parse.MAX_REPEAT, sre_parse.MIN_REPEAT, getattr(sre_parse, "POSSESSIVE_REPEAT", None)}
# With others, such as IGNORECASE, a character matches more than its set says.
_PLAIN_FLAGS = re.UNICODE | re.DOTALL | re.MULTILINE | re.VERBOSE
_CATEGORIES: dict[Any, Callable[[str], bool]] = {
    sre_parse.CATEGORY_DIGIT: str.isdecimal,
    sre_parse.CATEGORY_SPACE: str.isspace,
    sre_parse.CATEGORY_WORD: lambda char: char.isalnum() or char == "_",
    sre_parse.CATEGORY_NOT_DIGIT: lambda char: not char.isdecimal(),
    sre_parse.CATEGORY_NOT_SPACE: lambda char: not char.isspace(),
    sre_parse.CATEGORY_NOT_WORD: lambda char: not (char.isalnum() or char == "_"),
}
# All characters up to Latin's, and one of each kind of those beyond: a digit, a letter, a space, none of these.
_COMMON = range(0x100)
_BEYOND = (0x663, 0x416, 0x2003, 0x2014)
_CHARACTERS = {*_COMMON, *_BEYOND}


def check_patterns(field: str, patterns: list[str]) -> None:
    """Raise `RequestError` unless all compile, in SGLang's limits."""
    if len(patterns) > MAX_STOP_REGEX_COUNT:
        raise RequestError(field, f"{len(patterns)} patterns", f"at most {MAX_STOP_REGEX_COUNT}")
    for pattern in patterns:
        if len(pattern.encode(errors="replace")) > MAX_STOP_REGEX_LEN:
            raise RequestError(field, f"{len(pattern)} characters", f"at most {MAX_STOP_REGEX_LEN} bytes")
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise RequestError(field, pattern, f"a regular expression of Python ({error})") from None


def check_search(field: str, patterns: list[str], tokens: int, token_chars: int) -> None:
    """Raise `RequestError` for patterns that may take too long in the last ``tokens`` of a text.

    Args:
        token_chars: of the longest token.
    """
    chars = tokens * token_chars
    room = MAX_STEPS
    for pattern in patterns:
        room -= search_steps(pattern, chars)
        if room < 0:
            expected = (
                f"patterns that cannot take long in {chars} characters, which {tokens} tokens may have: repetitions "
                "with a bound, such as {1,20}, that do not overlap with what follows, or a smaller max_new_tokens"
            )
            raise RequestError(field, pattern, expected)


def search_steps(pattern: str, chars: int) -> float:
    """At most so many steps, up to a small factor, are needed to search ``chars`` characters; may be infinite."""
    parsed = sre_parse.parse(pattern)
    search = _Search(chars, plain=not parsed.state.flags & ~_PLAIN_FLAGS)
    try:
        ways = math.exp(search.ways(list(parsed), is_end=True))
        return chars * search.longest * ways if chars else 0
    except OverflowError:
        return math.inf


class _Search:
    """Of one pattern in ``chars`` characters. Numbers of ways are natural logarithms."""

    def __init__(self, chars: int, plain: bool) -> None:
        self._chars = max(1, chars)
        self._plain = plain
        # Of the repetitions that end in one way alone: so many steps that way may take.
        self.longest = 1

    def ways(self, items: list[Any], is_end: bool = False) -> float:
        """Of matching a sequence from where it starts; nothing makes it go back into what ``is_end`` of a pattern."""
        ways = 0.0
        for index, (kind, value) in enumerate(items):
            after = items[index + 1 :]
            ends = is_end and not after
            if kind in (sre_parse.GROUPREF, sre_parse.GROUPREF_EXISTS):
                return math.inf
            if kind in _REPEATS:
                low, high, body = value
                ways += self._repeated(low, high, body, None if ends else after)
            elif kind is sre_parse.BRANCH:
                ways += self._branched([list(part) for part in value[1]])
            elif kind is sre_parse.SUBPATTERN:
                was_plain, self._plain = self._plain, self._plain and not (value[1] or value[2])
                ways += self.ways(list(value[3]), ends)
                self._plain = was_plain
            else:
                ways += sum(self.ways(list(part)) for part in _parts(value))
        return ways

    def _repeated(self, low: int, high: int, body: Any, after: list[Any] | None) -> float:
        can_be_empty = body.getwidth()[0] == 0
        times = high if can_be_empty else min(high, self._chars)
        ways = self.ways(list(body))
        ways = times * ways if ways else 0.0
        if low < times and after is not None and _overlap(self._first(list(body)), self._first(after)):
            return ways + math.log(times - low + 1)
        self.longest = max(self.longest, times)
        return ways

    def _branched(self, branches: list[list[Any]]) -> float:
        ways = [self.ways(branch) for branch in branches]
        firsts = [self._first(branch) for branch in branches]
        if not any(_overlap(one, other) for index, one in enumerate(firsts) for other in firsts[:index]):
            return max(ways)
        largest = max(ways)
        return largest if largest == math.inf else largest + math.log(sum(math.exp(way - largest) for way in ways))

    def _first(self, items: list[Any]) -> set[int] | None:
        """Which of `_CHARACTERS` a sequence can start with; None where it may be empty, or is not known."""
        for kind, value in items:
            if kind in _REPEATS and value[0] > 0:
                return self._first(list(value[2]))
            if kind is sre_parse.SUBPATTERN and not (value[1] or value[2]):
                return self._first(list(value[3]))
            if kind is not sre_parse.AT:
                return _characters(kind, value) if self._plain else None
        return None


def _overlap(one: set[int] | None, other: set[int] | None) -> bool:
    return one is None or other is None or not one.isdisjoint(other)


def _characters(kind: Any, value: Any) -> set[int] | None:
    """Of a node that is one character."""
    if kind is sre_parse.NOT_LITERAL:
        kind, value = sre_parse.IN, [(sre_parse.NEGATE, None), (sre_parse.LITERAL, value)]
    items = value if kind is sre_parse.IN else [(kind, value)]
    # What may be among them, and what is for sure: of those beyond, a letter stands for many.
    possible: set[int] = set()
    certain: set[int] = set()
    for kind, value in items:
        if kind is sre_parse.CATEGORY:
            some = {code for code in _CHARACTERS if _CATEGORIES[value](chr(code))}
        elif kind in (sre_parse.LITERAL, sre_parse.RANGE):
            first, last = value if kind is sre_parse.RANGE else (value, value)
            some = set(_COMMON[first : last + 1])
            if last >= len(_COMMON):
                possible.update(_BEYOND)
        elif kind is not sre_parse.NEGATE:
            return None
        else:
            continue
        possible |= some
        certain |= some
    return _CHARACTERS - certain if items[0][0] is sre_parse.NEGATE else possible


def _parts(value: Any) -> list[Any]:
    """The patterns that a node of `sre_parse` holds, but for a branch's."""
    if isinstance(value, sre_parse.SubPattern):
        return [value]
    return [part for part in value if isinstance(part, sre_parse.SubPattern)] if isinstance(value, tuple) else []
