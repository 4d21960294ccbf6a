"""Grammars in a request, which xgrammar compiles."""

from typing import Any

from bdlora_sglang.serving.gate.errors import RequestError

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
