"""The last check before a request goes to the scheduler: it can be read there, and its numbers fit the prompt."""

import itertools
import re
from typing import Any

import msgspec
import numpy as np
from sglang.srt.managers.io_struct import TokenizedGenerateReqInput, msgpack_decode, msgpack_encode

from bdlora_sglang.serving.gate.bounds import MAX_TOP_LOGPROBS, TOKENIZED, Range
from bdlora_sglang.serving.gate.errors import RequestError

# Large, or objects of other kinds; SGLang makes them itself, and sends some as pickles.
_MADE_BY_SGLANG = (
    *("input_ids", "input_text", "input_embeds", "token_type_ids"),
    *("mm_inputs", "time_stats", "positional_embed_overrides"),
)


def check_tokenized(request: Any, vocab_size: int, hidden_size: int) -> None:
    """Raise `RequestError` for what the scheduler would not survive.

    Args:
        request: SGLang's ``TokenizedGenerateReqInput`` or ``TokenizedEmbeddingReqInput``.
        vocab_size: of the model; token ids are below it.
        hidden_size: the length of a token's embedding.
    """
    _check_input(request, vocab_size, hidden_size)
    for name, allowed in TOKENIZED.items():
        value = getattr(request, name, None)
        if value is not None:
            allowed.check(name, value)
    # The largest that there are.
    Range(0, min(MAX_TOP_LOGPROBS, vocab_size)).check("top_logprobs_num", getattr(request, "top_logprobs_num", 0))
    _check_positions(request)
    _check_arrives(request)


def _check_input(request: Any, vocab_size: int, hidden_size: int) -> None:
    if request.input_embeds is not None:
        embeds = np.asarray(request.input_embeds, dtype=np.float32) if _is_matrix(request.input_embeds) else None
        if embeds is None or embeds.shape[1:] != (hidden_size,) or not len(embeds) or not np.isfinite(embeds).all():
            raise RequestError("input_embeds", request.input_embeds, f"finite vectors of {hidden_size} numbers")
        return
    ids = request.input_ids
    in_session = getattr(request, "session_params", None) is not None
    if ids is None or len(ids) == 0:
        if request.mm_inputs is None and not in_session:
            found = request.input_text if request.input_text is not None else []
            raise RequestError("text", found, "a prompt of at least one token")
        return
    # A processor of images puts tokens of its own into the prompt.
    if request.mm_inputs is None:
        tokens = np.frombuffer(ids, dtype=np.int64)
        for token in (int(tokens.min()), int(tokens.max())):
            Range(0, vocab_size - 1).check("input_ids", token)


def _check_positions(request: Any) -> None:
    num_tokens = 0 if request.input_ids is None else len(request.input_ids)
    if isinstance(request, TokenizedGenerateReqInput) and request.session_params is None:
        # -1: of the output alone.
        Range(-1, max(num_tokens, len(request.input_embeds or ()))).check(
            "logprob_start_len", request.logprob_start_len
        )
        Range(0, num_tokens).check("routed_experts_start_len", request.routed_experts_start_len)
    for name in ("token_indices_to_pool", "multi_item_delimiter_indices"):
        positions = getattr(request, name)
        if positions is None:
            continue
        if not positions or any(a >= b for a, b in itertools.pairwise(positions)):
            raise RequestError(name, positions, "positions in the prompt, in ascending order")
        for position in positions:
            Range(0, num_tokens - 1).check(name, position)


def _check_arrives(request: Any) -> None:
    """The scheduler reads its requests by their types, and ends with one that does not fit."""
    light = msgspec.structs.replace(request, **dict.fromkeys(_MADE_BY_SGLANG))
    try:
        msgpack_decode(msgpack_encode(light))
    except (msgspec.ValidationError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise _wrong_field(request, str(error)) from None


def _wrong_field(request: Any, message: str) -> RequestError:
    # SGLang's structs are arrays on the way, whose first item is the type.
    index = re.search(r"\$\[(\d+)\]", message)
    names = type(request).__struct_fields__
    if index is None or int(index[1]) > len(names):
        return RequestError("request", message, "values that SGLang's types allow")
    name = names[int(index[1]) - 1]
    expected = re.match(r"Expected `([^`]+)`", message)
    return RequestError(name, getattr(request, name), expected[1] if expected else message)


def _is_matrix(rows: Any) -> bool:
    return isinstance(rows, list) and all(
        isinstance(row, list) and len(row) == len(rows[0]) and all(isinstance(x, int | float) for x in row)
        for row in rows
    )
