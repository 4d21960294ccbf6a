"""JSON bodies made from the type hints of SGLang's request classes: right values, those at the ends, and others."""

import dataclasses
import enum
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from hypothesis import strategies as st
from pydantic import BaseModel
from sglang.srt.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from sglang.srt.entrypoints.ollama.protocol import OllamaChatRequest, OllamaGenerateRequest
from sglang.srt.entrypoints.openai.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    ResponsesRequest,
    TokenizeRequest,
)
from sglang.srt.managers.io_struct import (
    AbortReq,
    CloseSessionReqInput,
    EmbeddingReqInput,
    GenerateReqInput,
    OpenSessionReqInput,
)
from sglang.srt.sampling.sampling_params import SamplingParams

_INTEGERS = [
    *(-(2**63) - 1, -(2**63), -(2**31) - 1, -2, -1, 0, 1, 2, 7, 127, 511, 512, 513, 1024, 10**6),
    *(2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1),
]
_FLOATS = [0.0, -0.0, 1e-300, 1e-46, 1e-38, 1e-7, 1e-6, 0.5, 1.0, 1.0001, 2.0, -1.0, 1e30, 3.4e38, 1e39, 1e308]
_STRINGS = [
    *("", " ", "a", "bd2-r8", "nope", "\x00", "\N{SLIGHTLY SMILING FACE}", "[", "(a+)+$", "HEALTH_CHECK_x", "x" * 3000),
    *('{"type": "object"}', '{"$ref": "#"}', "[]", 'root ::= "a" root', "root ::= root", "last", "json", "default"),
]
integers = st.sampled_from(_INTEGERS) | st.integers(-5, 600)
floats = st.sampled_from(_FLOATS) | st.floats(allow_nan=False, allow_infinity=False)
strings = st.sampled_from(_STRINGS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
json_values = st.recursive(
    st.none() | st.booleans() | integers | floats | strings,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(strings, inner, max_size=3),
    max_leaves=6,
)


def values(hint: Any, depth: int = 0) -> st.SearchStrategy[Any]:
    """JSON values of a type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return values(arguments[0], depth)
    if origin in (Union, types.UnionType):
        return st.one_of([values(argument, depth) for argument in arguments])
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (list, set, tuple) and arguments:
        return st.lists(values(arguments[0], depth), max_size=3)
    if origin is dict and arguments:
        return st.dictionaries(strings | integers.map(str), values(arguments[1], depth), max_size=3)
    if isinstance(hint, type):
        simple = {bool: st.booleans(), int: integers, float: floats, str: strings, type(None): st.none()}
        if hint in simple:
            return simple[hint]
        if issubclass(hint, enum.Enum):
            return st.sampled_from([item.value for item in hint])
        if issubclass(hint, BaseModel) and depth < 2:
            hints = {name: field.annotation for name, field in hint.model_fields.items()}
            return st.fixed_dictionaries({}, optional={name: values(h, depth + 1) for name, h in hints.items()})
    return json_values


def _fields(request: Any) -> dict[str, Any]:
    if issubclass(request, BaseModel):
        return {name: field.annotation for name, field in request.model_fields.items()}
    hints = get_type_hints(request, include_extras=True)
    names = (
        [f.name for f in dataclasses.fields(request)]
        if dataclasses.is_dataclass(request)
        else request.__struct_fields__
    )
    return {name: hints[name] for name in names}


_MESSAGES = [{"role": "user", "content": "the quick brown fox"}]
_SHORT = {"max_new_tokens": 2}
# Path, SGLang's request class, and bodies that are right.
ENDPOINTS: list[tuple[str, Any, list[dict[str, Any]]]] = [
    (
        "/generate",
        GenerateReqInput,
        [
            {"text": "the quick", "sampling_params": _SHORT},
            {"text": ["the quick", "brown"], "sampling_params": _SHORT},
            {"input_ids": [11, 23, 5], "sampling_params": _SHORT, "lora_path": "bd2-r8"},
            {"input_ids": [[11, 23], [5]], "sampling_params": _SHORT, "lora_path": ["bd2-r8", None]},
        ],
    ),
    ("/encode", EmbeddingReqInput, [{"text": "the quick"}, {"input_ids": [[1, 2], [3]]}]),
    ("/v1/completions", CompletionRequest, [{"model": "bd4-r8", "prompt": "the quick", "max_tokens": 2}]),
    ("/v1/chat/completions", ChatCompletionRequest, [{"model": "base", "messages": _MESSAGES, "max_tokens": 2}]),
    ("/v1/responses", ResponsesRequest, [{"model": "bd2-r8", "input": "the quick", "max_output_tokens": 2}]),
    ("/v1/messages", AnthropicMessagesRequest, [{"model": "bd2-r8", "messages": _MESSAGES, "max_tokens": 2}]),
    ("/v1/tokenize", TokenizeRequest, [{"model": "base", "prompt": "the quick"}]),
    ("/api/chat", OllamaChatRequest, [{"model": "base", "messages": _MESSAGES, "options": {"num_predict": 2}}]),
    ("/api/generate", OllamaGenerateRequest, [{"model": "bd2-r8", "prompt": "a", "options": {"num_predict": 2}}]),
    ("/open_session", OpenSessionReqInput, [{"capacity_of_str_len": 100}]),
    ("/close_session", CloseSessionReqInput, [{"session_id": "x"}]),
    ("/abort_request", AbortReq, [{"rid": "nobody's"}]),
]
_SAMPLING = _fields(SamplingParams)
_OLLAMA = {"temperature": float, "top_p": float, "top_k": int, "num_predict": int, "stop": list[str], "seed": int}


@st.composite
def requests(draw: Any) -> tuple[str, dict[str, Any]]:
    """A path, and a right body in which up to three fields were changed. Those under test are drawn most often."""
    path, request, bodies = draw(st.sampled_from(ENDPOINTS[:1] * 6 + ENDPOINTS[2:4] * 2 + ENDPOINTS))
    body = dict(draw(st.sampled_from(bodies)))
    hints = _fields(request)
    for name in draw(st.lists(st.sampled_from(sorted(hints)), max_size=3, unique=True)):
        body[name] = draw(values(hints[name]) if draw(st.integers(0, 9)) else json_values)
    inner = {"sampling_params": _SAMPLING, "options": _OLLAMA}
    for name, kinds in inner.items():
        if isinstance(body.get(name), dict):
            names = draw(st.lists(st.sampled_from(sorted(kinds)), max_size=3, unique=True))
            changed = {n: draw(values(kinds[n]) if draw(st.integers(0, 9)) else json_values) for n in names}
            body[name] = {**body[name], **changed}
    # It does what it says, to the good requests.
    body.pop("abort_all", None)
    return path, _affordable(body)


def _affordable(value: Any, name: str = "") -> Any:
    """The same without the requests that are right and take minutes on a CPU."""
    if isinstance(value, dict):
        return {key: _affordable(item, key) for key, item in value.items()}
    if isinstance(value, list) and name == "sampling_params":
        return [_affordable(item) for item in value]
    many = {"n": 4, "beam_width": 4, "best_of": 4}.get(name, 16 if "tokens" in name or "predict" in name else None)
    if many is not None and isinstance(value, int | float) and many < value <= 1024:
        return many
    return many if value is None and name.startswith("max_") else value
