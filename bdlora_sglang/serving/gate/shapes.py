"""Requests that hold one prompt or many: every field has a value for the one, one for all, or a list with one for each.

What a field may hold is read from the type hints of SGLang's own request classes (``managers/io_struct.py``).
"""

import dataclasses
import types
from array import array
from functools import cache
from typing import Annotated, Any, Optional, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from bdlora_sglang.serving.gate.errors import RequestError

# Long, or of types that say nothing: checked elsewhere, or by SGLang itself.
_CHECKED_ELSEWHERE = {
    *("input_ids", "input_embeds", "sampling_params", "kv_hints"),
    *("image_data", "video_data", "audio_data", "mm_hashes", "mm_content_hashes"),
}


@dataclasses.dataclass(frozen=True)
class _Field:
    """``one`` is a value for one prompt; ``each``, where prompts can differ, a list with one for each prompt.

    ``depth``: how many lists a value for one prompt is nested in.
    """

    name: str
    one: TypeAdapter[Any]
    each: TypeAdapter[Any] | None
    depth: int

    def check(self, value: object, num_prompts: int | None) -> None:
        adapter = self.one
        if self.each is not None and num_prompts is not None and _is_nested(value, self.depth + 1):
            if len(value) != num_prompts:  # type: ignore[arg-type]
                raise RequestError(self.name, value, f"a list of {num_prompts}, one for each prompt")
            adapter = self.each
        try:
            adapter.validate_python(value)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = "".join(f"[{part}]" for part in first["loc"] if isinstance(part, int))
            raise RequestError(self.name + place, first["input"], _lower(first["msg"])) from None


def num_prompts(request: Any) -> int | None:
    """How many prompts ``request`` holds; None for one that is not in a list."""
    for name in ("text", "input_ids", "input_embeds"):
        prompts = getattr(request, name)
        if prompts is not None:
            depth = {"text": 0, "input_ids": 1, "input_embeds": 2}[name]
            return len(prompts) if _is_nested(prompts, depth + 1) else None
    return None


def check_shapes(request: Any) -> None:
    """Raise `RequestError` where a field of a generation or embedding request fits neither its type nor the prompts."""
    count = num_prompts(request)
    if count == 0:
        raise RequestError("text", [], "at least one prompt")
    for field in _fields(request.__class__):
        value = getattr(request, field.name)
        if value is not None:
            field.check(value, count)
    for name in ("image_data", "video_data", "audio_data", "sampling_params"):
        value = getattr(request, name)
        if isinstance(value, list) and name == "sampling_params" and count is None:
            raise RequestError(name, value, "an object, as there is one prompt")
        # An empty list of media stands for none.
        if isinstance(value, list) and (value or name == "sampling_params") and count not in (None, len(value)):
            raise RequestError(name, value, f"a list of {count}, one for each prompt")
    # SGLang: the session may hold the whole prompt.
    _check_tokens(request.input_ids, count, may_be_empty=bool(getattr(request, "session_params", None)))
    _check_embeds(request.input_embeds)


def _check_tokens(input_ids: object, count: int | None, may_be_empty: bool) -> None:
    """Whether they are in the vocabulary is left to the tokenized request."""
    if input_ids is None:
        return
    if not isinstance(input_ids, list):
        raise RequestError("input_ids", input_ids, "a list of integers, or of such lists")
    rows = input_ids if count is not None else [input_ids]
    if count is not None and len(rows) != count:
        raise RequestError("input_ids", input_ids, f"a list of {count}, one for each prompt")
    for row in rows:
        try:
            array("q", row if isinstance(row, list) else [None])
        except (TypeError, OverflowError):
            raise RequestError("input_ids", row, "a list of integers") from None
        if not row and (count is not None or not may_be_empty):
            raise RequestError("input_ids", row, "at least one token")


def _check_embeds(embeds: object) -> None:
    """Lengths and numbers are left to the tokenized request."""
    row = embeds[0] if embeds is not None and _is_nested(embeds, 2) else None  # type: ignore[index]
    if embeds is not None and not row:
        raise RequestError("input_embeds", embeds, "a list of vectors, or of such lists")


@cache
def _fields(request: type) -> tuple[_Field, ...]:
    hints = get_type_hints(request, include_extras=True)
    names = [field.name for field in dataclasses.fields(request)]
    return tuple(
        _field(name, hints[name]) for name in names if name not in _CHECKED_ELSEWHERE and hints[name] is not Any
    )


def _field(name: str, hint: Any) -> _Field:
    hint = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    union = get_origin(hint) in (Union, types.UnionType)
    options = [option for option in get_args(hint) if option is not type(None)] if union else [hint]
    depths = {option: _depth(option) for option in options}
    least, most = min(depths.values()), max(depths.values())
    one: Any = Union[tuple(option for option in options if depths[option] == least)]  # noqa: UP007
    each: TypeAdapter[Any] | None = None
    if most > least:
        item: Any = Union[tuple(get_args(option)[0] for option in options if depths[option] > least)]  # noqa: UP007
        # Lists of lists say no less with None in the place of one of them.
        each_hint: Any = types.GenericAlias(list, item if least == 0 else Optional[item])  # noqa: UP045
        each = TypeAdapter(each_hint)
    return _Field(name, TypeAdapter(one), each, least)


def _depth(hint: Any) -> int:
    return 1 + _depth(get_args(hint)[0]) if get_origin(hint) is list and get_args(hint) else 0


def _is_nested(value: object, depth: int) -> bool:
    """Whether ``value`` is a list ``depth`` deep, as far as its first items tell. An empty list is one deep."""
    for level in range(depth):
        if not isinstance(value, list):
            return False
        if level < depth - 1:
            value = next((item for item in value if item is not None), None)
    return True


def _lower(message: str) -> str:
    return message.removeprefix("Input should be ") or message
