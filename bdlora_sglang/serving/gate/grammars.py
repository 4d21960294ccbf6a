"""Grammars and regular expressions in a request, which others compile and run for it."""

import re
import sys
from importlib import import_module
from typing import Any

from bdlora_sglang.serving.gate.errors import RequestError

# Python 3.11 renamed it.
sre_parse: Any = import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")

# xgrammar refuses what is nested too deep and does not unroll repetitions; time goes by length.
MAX_GRAMMAR_CHARS = 1 << 18
_GRAMMARS = ("json_schema", "regex", "ebnf", "structural_tag")


def check_grammars(params: dict[str, Any], place: str) -> None:
    """Raise `RequestError` for a grammar that is too long."""
    for name in _GRAMMARS:
        grammar = params.get(name)
        if grammar is not None and len(grammar) > MAX_GRAMMAR_CHARS:
            raise RequestError(
                f"{place}.{name}", f"{len(grammar)} characters", f"at most {MAX_GRAMMAR_CHARS} characters"
            )


def check_stop_regex(field: str, pattern: str) -> None:
    """Raise `RequestError` unless ``pattern`` compiles and cannot take the scheduler exponential time.

    The scheduler searches the text after each token with Python's ``re``, while all other requests wait.
    """
    try:
        re.compile(pattern)
        parsed = sre_parse.parse(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise RequestError(field, pattern, f"a regular expression of Python ({error})") from None
    if _repeats_nested(parsed):
        raise RequestError(field, pattern, "no repetition of variable length inside another, which may take for ever")


def _repeats_nested(pattern: Any, inside: bool = False) -> bool:
    """Whether a repetition of variable length is inside another, or a reference back is anywhere."""
    for kind, value in pattern:
        if kind in (sre_parse.GROUPREF, sre_parse.GROUPREF_EXISTS):
            return True
        repeats = kind in (sre_parse.MAX_REPEAT, sre_parse.MIN_REPEAT)
        varies = repeats and value[0] != value[1]
        if varies and inside:
            return True
        # Optional parts take two ways each, repeated ones many.
        within = inside or (varies and value[1] > 1)
        if any(_repeats_nested(part, within) for part in _parts(kind, value)):
            return True
    return False


def _parts(kind: Any, value: Any) -> list[Any]:
    """The patterns that a node of `sre_parse` holds."""
    if kind is sre_parse.BRANCH:
        return list(value[1])
    if isinstance(value, sre_parse.SubPattern):
        return [value]
    if isinstance(value, tuple):
        return [part for part in value if isinstance(part, sre_parse.SubPattern)]
    return []
