"""SGLang's TokenizerManager, through which every request passes, with a gate before it."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, suppress
from functools import cached_property, partial
from http import HTTPStatus
from typing import Any

import fastapi
from fastapi import BackgroundTasks
from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
from sglang.srt.entrypoints.engine import init_tokenizer_manager
from sglang.srt.managers.io_struct import (
    BatchTokenizedEmbeddingReqInput,
    BatchTokenizedGenerateReqInput,
    ReleaseMemoryOccupationReqInput,
    ResumeMemoryOccupationReqInput,
    TokenizedEmbeddingReqInput,
    TokenizedGenerateReqInput,
)
from sglang.srt.runtime_context import get_exec, get_observability
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import PortArgs, ServerArgs

from bdlora_sglang.serving.gate.adapters import AdapterKeeper
from bdlora_sglang.serving.gate.asked import asked_adapter
from bdlora_sglang.serving.gate.control import ReleasedMemory, check_control
from bdlora_sglang.serving.gate.errors import RequestError
from bdlora_sglang.serving.gate.metrics import exposition, state_families
from bdlora_sglang.serving.gate.requests import Served, check_request
from bdlora_sglang.serving.gate.sampling import check_params
from bdlora_sglang.serving.gate.scheduler import ADAPTERS_NOW
from bdlora_sglang.serving.gate.stop_regex import check_search
from bdlora_sglang.serving.gate.tokenized import check_tokenized
from bdlora_sglang.serving.hardware import on_cpu_platform
from bdlora_sglang.serving.options import GateOptions


class GatedTokenizerManager(AdapterKeeper):
    """Checks requests before SGLang sees them.

    It raises `RequestError`, which SGLang's endpoints answer with its status and message.
    """

    def __init__(self, server_args: ServerArgs, port_args: PortArgs, *, options: GateOptions, **kwargs: Any) -> None:
        self._memory = ReleasedMemory()
        super().__init__(server_args, port_args, options=options, **kwargs)
        self._served = self._what_is_served()

    def _what_is_served(self) -> Served:
        features = get_exec().features
        flags = {
            "return_routed_experts": ("--enable-return-routed-experts", features.enable_return_routed_experts),
            "return_indexer_topk": ("--enable-return-indexer-topk", features.enable_return_indexer_topk),
        }
        return Served(
            vocab_size=self.model_config.vocab_size,
            multimodal=self.mm_processor is not None,
            needs_flag={name: flag for name, (flag, is_set) in flags.items() if not is_set},
            custom_labels=get_observability().tokenizer_metrics_allowed_custom_labels or (),
        )

    # --- requests ----------------------------------------------------------------------------------------------

    async def generate_request(self, obj: Any, request: fastapi.Request | None = None) -> AsyncIterator[Any]:
        if self._memory:
            if str(obj.rid).startswith(HEALTH_CHECK_RID_PREFIX):
                # SGLang's sign that an answer came: the server is as healthy as it was told to be.
                self.last_receive_tstamp = time.time()
                return
            raise RequestError("memory", "released", "/resume_memory_occupation first", HTTPStatus.SERVICE_UNAVAILABLE)
        asked = asked_adapter()
        if asked is not None:
            obj.lora_path = asked.lora_path
        check_request(obj, self._served, from_client=_is_native(request))
        async with aclosing(super().generate_request(obj, request)) as answers:
            async for answer in answers:
                yield answer

    def check_body(self, fields: dict[str, Any]) -> None:
        """Raise `RequestError` for a wrong body of ``/generate``, where SGLang's schema would not name the field."""
        check_params(fields.get("sampling_params"), self._served.vocab_size)

    def create_abort_task(self, obj: Any) -> BackgroundTasks:
        tasks = super().create_abort_task(obj)

        async def abort_unless_refused() -> None:
            # SGLang looks for what only a request that was taken up has.
            if hasattr(obj, "is_single"):
                await tasks()

        later = BackgroundTasks()
        later.add_task(abort_unless_refused)
        return later

    def _create_tokenized_object(self, obj: Any, *args: Any, **kwargs: Any) -> Any:
        tokenized = super()._create_tokenized_object(obj, *args, **kwargs)
        extra_key = getattr(tokenized, "extra_key", None)
        if extra_key is not None:
            # SGLang appends an adapter's id, of hexadecimal digits, and nothing for the base model. With an end of its
            # own, no key of a client can read the prefixes of an adapter.
            tokenized.extra_key = f"{extra_key}\x1f"
        check_tokenized(tokenized, self.model_config.vocab_size, self.model_config.hidden_size)
        params = getattr(tokenized, "sampling_params", None)
        if params is not None and params.stop_regex_strs:
            self._check_search(params)
        return tokenized

    def _check_search(self, params: SamplingParams) -> None:
        """Of the tokens that SGLang searches (``Req.tail_str``)."""
        tokens = self.context_len if params.max_new_tokens is None else params.max_new_tokens
        longest_match = max(params.stop_regex_max_len, params.stop_str_max_len) + 1
        patterns = params.stop_regex_strs
        check_search("sampling_params.stop_regex", patterns, min(tokens, longest_match), self._longest_token)

    @cached_property
    def _longest_token(self) -> int:
        """Characters; of a byte-level vocabulary bytes, which are as many at least."""
        return max(map(len, self.tokenizer.get_vocab()))

    async def _handle_abort_finish_reason(self, out: dict[Any, Any], state: Any, is_stream: bool) -> Any:
        reason = out["meta_info"]["finish_reason"]
        # A grammar that allows no token at all, such as one that only refers to itself: SGLang calls it its own fault.
        if "accept_token failed" in str(reason.get("message")) and "Accepted tokens: []" in reason["message"]:
            reason["status_code"] = int(HTTPStatus.BAD_REQUEST)
        return await super()._handle_abort_finish_reason(out, state, is_stream)

    # --- what is told ------------------------------------------------------------------------------------------

    def collect_metrics(self, state: Any, recv_obj: Any, i: int) -> None:
        super().collect_metrics(state, recv_obj, i)
        if state.finished:
            generated = getattr(recv_obj, "completion_tokens", None)
            self.adapter_counts.finished(
                state.obj.lora_path, recv_obj.prompt_tokens[i], generated[i] if generated else 0
            )

    async def adapter_metrics(self) -> bytes:
        """Adapters in Prometheus' text format; without what the schedulers do when they do not answer at once."""
        families = list(self.adapter_counts.families())
        with suppress(asyncio.TimeoutError):
            states = await asyncio.wait_for(self.get_internal_state(), _SCRAPE_SECONDS)
            now = [state[ADAPTERS_NOW] for state in states if ADAPTERS_NOW in state]
            families += state_families(now, self.adapter_counts)
        return exposition(families)

    # --- what steers the server --------------------------------------------------------------------------------

    def _dispatch_to_scheduler(self, obj: Any) -> None:
        if not isinstance(obj, _REQUESTS):
            check_control(obj)
        super()._dispatch_to_scheduler(obj)

    async def release_memory_occupation(
        self, obj: ReleaseMemoryOccupationReqInput, request: fastapi.Request | None = None
    ) -> None:
        check_control(obj)
        busy = RequestError("server", "requests under way", "none, to release memory", HTTPStatus.CONFLICT)
        if self.rid_to_state:
            raise busy
        if on_cpu_platform():
            raise RequestError("memory", "that of a CPU", "a GPU's: there is none to release")
        tags = self._memory.release(obj.tags)
        # From here on no request comes in. SGLang's scheduler ends unless it is idle, which flushing waits for.
        if not (await self.flush_cache(timeout_s=_IDLE_SECONDS)).success:
            self._memory.resumed(tags)
            raise busy
        await super().release_memory_occupation(obj, request)

    async def resume_memory_occupation(
        self, obj: ResumeMemoryOccupationReqInput, request: fastapi.Request | None = None
    ) -> None:
        check_control(obj)
        tags = self._memory.resume(obj.tags)
        await super().resume_memory_occupation(obj, request)
        self._memory.resumed(tags)


_REQUESTS = (
    *(TokenizedGenerateReqInput, BatchTokenizedGenerateReqInput),
    *(TokenizedEmbeddingReqInput, BatchTokenizedEmbeddingReqInput),
)
_IDLE_SECONDS = 5.0
_SCRAPE_SECONDS = 2.0


def _is_native(request: fastapi.Request | None) -> bool:
    """Whether a request comes from an endpoint of SGLang's own, whose body is the request itself."""
    return request is not None and request.scope.get("path", "").endswith(("generate", "/encode", "/classify"))


def gated_tokenizer_manager(options: GateOptions) -> Callable[..., Any]:
    """What SGLang's ``init_tokenizer_manager_func`` expects."""
    return partial(init_tokenizer_manager, TokenizerManagerClass=partial(GatedTokenizerManager, options=options))
