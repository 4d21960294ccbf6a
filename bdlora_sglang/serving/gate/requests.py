"""A generation or embedding request as it comes in, before SGLang makes anything of it."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
from sglang.srt.managers.embed_types import PositionalEmbeds
from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput, SessionParams

from bdlora_sglang.serving.gate.bounds import Range
from bdlora_sglang.serving.gate.errors import RequestError
from bdlora_sglang.serving.gate.sampling import check_num_samples, check_params
from bdlora_sglang.serving.gate.shapes import check_shapes, num_prompts

# SGLang's own endpoints fill these in. From the body of a client they would reach the scheduler as they are.
_SET_BY_THE_SERVER = (
    *("lora_id", "http_worker_ipc", "received_time", "external_trace_header", "return_bytes"),
    *("positional_embed_overrides", "embed_overrides", "decision_layout"),
    *("token_indices_to_pool", "multi_item_delimiter_indices"),
    *("need_wait_for_mm_inputs", "num_items_assigned", "encoder_urls"),
)


@dataclass(frozen=True)
class Served:
    """What the model and the flags of a server allow in a request."""

    vocab_size: int
    multimodal: bool
    # Each maps the field that asks for something to the flag without which the scheduler cannot give it.
    needs_flag: dict[str, str]
    custom_labels: Collection[str] = ()


def check_request(request: Any, served: Served, from_client: bool) -> None:
    """Raise `RequestError` for a request that SGLang would not answer as it is meant, or not survive.

    Args:
        request: SGLang's ``GenerateReqInput`` or ``EmbeddingReqInput``; an adapter named "" becomes None, the base.
        served: what this server allows.
        from_client: whether all fields are from the body of a client.
    """
    if not isinstance(request, GenerateReqInput | EmbeddingReqInput):
        return
    if from_client:
        _check_fields_of_clients(request)
    check_shapes(request)
    count = num_prompts(request)
    _check_media(request, count, served)
    check_params(request.sampling_params, served.vocab_size)
    check_num_samples(count or 1, request.sampling_params)
    _name_no_adapter_by_none(request)
    if isinstance(request, EmbeddingReqInput):
        if count is not None and isinstance(request.rid, str):
            request.rid = [f"{request.rid}_{index}" for index in range(count)]
        return
    _check_session(request.session_params)
    _check_positional_embeds(request.positional_embed_overrides)
    for name, flag in served.needs_flag.items():
        if getattr(request, name):
            raise RequestError(name, getattr(request, name), f"it only where the server was started with {flag}")
    for label in request.custom_labels or ():
        if label not in served.custom_labels:
            raise RequestError("custom_labels", label, "labels that --tokenizer-metrics-allowed-custom-labels lists")


def _check_fields_of_clients(request: Any) -> None:
    for name in _SET_BY_THE_SERVER:
        # None and False are what SGLang's own clients may send along.
        if (value := getattr(request, name, None)) not in (None, False):
            raise RequestError(name, value, "none: the server sets it itself")
    for rid in request.rid if isinstance(request.rid, list) else [request.rid]:
        if isinstance(rid, str) and (not rid or rid.startswith(HEALTH_CHECK_RID_PREFIX)):
            raise RequestError("rid", rid, f"a name that does not start with {HEALTH_CHECK_RID_PREFIX}")


def _check_media(request: Any, count: int | None, served: Served) -> None:
    # SGLang looks for one of each prompt in a list that is there, an empty one too.
    request.image_data = request.image_data or None
    request.video_data = request.video_data or None
    request.audio_data = request.audio_data or None
    for name in ("image_data", "video_data", "audio_data"):
        if (value := getattr(request, name)) is not None and not served.multimodal:
            raise RequestError(name, value, "none: this model reads text alone")
    if request.image_data is None:
        # SGLang looks for one of each prompt.
        request.modalities = None
    elif count is not None and isinstance(request.image_data, list):
        # SGLang takes the first for all: lists of images, or images.
        images = [[] if one is None else one for one in request.image_data]
        request.image_data = [one if isinstance(one, list) else [one] for one in images]


def _name_no_adapter_by_none(request: Any) -> None:
    path = request.lora_path
    if isinstance(path, list):
        request.lora_path = [name or None for name in path] if any(path) else None
    elif path == "":
        request.lora_path = None


def _check_session(params: Any) -> None:
    if not params:
        return
    allowed = SessionParams.__struct_fields__
    for name in params:
        if name not in allowed:
            raise RequestError(
                f"session_params.{name}", params[name], f"no such field, but some of: {', '.join(allowed)}"
            )
    offset = params.get("offset")
    if offset is not None:
        Range(-1, math.inf).check("session_params.offset", offset)


def _check_positional_embeds(overrides: Any) -> None:
    for one in overrides if isinstance(overrides, list) else [overrides]:
        if one is not None and not isinstance(one, PositionalEmbeds):
            raise RequestError("positional_embed_overrides", one, "PositionalEmbeds of SGLang")
