"""``sampling_params``: what SGLang's `SamplingParams` takes, held to its types and to ranges."""

from functools import cache
from typing import Any, get_type_hints

import msgspec
from sglang.srt.sampling.sampling_params import SamplingParams

from bdlora_sglang.serving.gate.bounds import LOGIT_BIAS, MAX_PROMPTS, SAMPLING, Range
from bdlora_sglang.serving.gate.errors import RequestError
from bdlora_sglang.serving.gate.grammars import check_grammars
from bdlora_sglang.serving.gate.stop_regex import check_patterns

# SGLang: "Internal fields (populated by __post_init__ or normalize(), not API-facing)". Its OpenAI endpoints set
# ``ebnf_full_assistant`` themselves. ``watermark`` is read by rules of its own.
_INTERNAL = {"stop_strs", "stop_regex_strs", "stop_str_max_len", "stop_regex_max_len", "is_normalized"}
_UNTYPED = {"watermark"}


def check_params(params: object, vocab_size: int) -> None:
    """Raise `RequestError` for wrong parameters: of one prompt, of all, or a list with one for each prompt."""
    if isinstance(params, list):
        for index, one in enumerate(params):
            _check_one(one, vocab_size, f"sampling_params[{index}]")
    elif params is not None:
        _check_one(params, vocab_size, "sampling_params")


def _check_one(params: object, vocab_size: int, place: str) -> None:
    """Drops an ``n`` of None, which SGLang would compare with a number."""
    if not isinstance(params, dict):
        raise RequestError(place, params, "an object")
    if params.get("n", 1) is None:
        del params["n"]
    hints = _hints()
    for name, value in params.items():
        field = f"{place}.{name}"
        if name not in hints:
            raise RequestError(field, value, f"no such field, but some of: {', '.join(sorted(hints))}")
        if value is None or name in _UNTYPED:
            continue
        try:
            msgspec.convert(value, hints[name], strict=True)
        except msgspec.ValidationError as error:
            raise RequestError(field, value, str(error).removeprefix("Expected ").replace("`", "")) from None
        if name in SAMPLING:
            SAMPLING[name].check(field, value)
    _check_tokens(params, vocab_size, place)
    check_grammars(params, place)
    check_patterns(f"{place}.stop_regex", _listed(params.get("stop_regex")))
    for word in _listed(params.get("stop")):
        if not word:
            raise RequestError(f"{place}.stop", word, "at least one character")


def check_num_samples(count: int, params: object) -> None:
    """Raise `RequestError` when ``count`` prompts make too many requests, each for itself or all with ``n``."""
    first = params[0] if isinstance(params, list) and params else params
    n = (first or {}).get("n", 1) if isinstance(first, dict) else 1
    if count * n > MAX_PROMPTS:
        raise RequestError("sampling_params.n", n, f"at most {MAX_PROMPTS} samples in all, for {count} prompts")


def _check_tokens(params: dict[str, Any], vocab_size: int, place: str) -> None:
    in_vocabulary = Range(0, vocab_size - 1)
    for token in params.get("stop_token_ids") or ():
        in_vocabulary.check(f"{place}.stop_token_ids", token)
    for key, bias in (params.get("logit_bias") or {}).items():
        field = f"{place}.logit_bias[{key!r}]"
        if not key.isdecimal() or not key.isascii() or len(key) > 10:
            raise RequestError(field, key, f"a token id as its key, from 0 to {vocab_size - 1}")
        in_vocabulary.check(field, int(key))
        LOGIT_BIAS.check(field, bias)


def _listed(value: Any) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else value


@cache
def _hints() -> dict[str, Any]:
    return {name: hint for name, hint in get_type_hints(SamplingParams).items() if name not in _INTERNAL}
