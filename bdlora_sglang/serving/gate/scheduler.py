"""The scheduler's end of the gate: a request that slipped through fails by itself, and not the server."""

import logging
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from sglang.srt.managers.io_struct import (
    AbortReq,
    ExpertDistributionReq,
    ExpertDistributionReqOutput,
    GetInternalStateReq,
    GetInternalStateReqOutput,
    GetWeightsByNameReqInput,
    GetWeightsByNameReqOutput,
    OpenSessionReqInput,
    OpenSessionReqOutput,
    ProfileReq,
    ProfileReqOutput,
    SetInternalStateReq,
    SetInternalStateReqOutput,
)
from sglang.srt.managers.scheduler import Scheduler
from sglang.utils import TypeBasedDispatcher

from bdlora_sglang.serving.gate.metrics import adapters_now

ADAPTERS_NOW = "adapters"

logger = logging.getLogger(__name__)

# What to answer when it fails. None of these changes the weights, so all ranks go on as they were.
_FAILURES: dict[type, Callable[[Any, Exception], Any]] = {
    ProfileReq: lambda _, error: ProfileReqOutput(success=False, message=str(error)),
    GetWeightsByNameReqInput: lambda *_: GetWeightsByNameReqOutput(parameter=None),
    ExpertDistributionReq: lambda *_: ExpertDistributionReqOutput(),
    OpenSessionReqInput: lambda request, _: OpenSessionReqOutput(session_id=request.session_id, success=False),
    SetInternalStateReq: lambda *_: SetInternalStateReqOutput(updated=False),
}


class _GuardedDispatcher(TypeBasedDispatcher):
    def __call__(self, obj: Any) -> Any:
        try:
            return super().__call__(obj)
        except Exception as error:
            if type(obj) not in _FAILURES:
                raise
            logger.exception("%s failed", type(obj).__name__)
            return _FAILURES[type(obj)](obj, error)


class GuardedScheduler(Scheduler):
    """Answers with a failure where SGLang's would end, as long as the request has not entered a batch."""

    def handle_generate_request(self, recv_req: Any, **kwargs: Any) -> None:
        self._or_abort(recv_req, lambda: super(GuardedScheduler, self).handle_generate_request(recv_req, **kwargs))

    def handle_embedding_request(self, recv_req: Any, **kwargs: Any) -> None:
        self._or_abort(recv_req, lambda: super(GuardedScheduler, self).handle_embedding_request(recv_req, **kwargs))

    def _or_abort(self, request: Any, handle: Callable[[], None]) -> None:
        try:
            handle()
        except Exception as error:
            logger.exception("Request %s cannot be taken up", request.rid)
            reason = {"type": "abort", "status_code": HTTPStatus.BAD_REQUEST, "message": str(error) or repr(error)}
            self.ipc_channels.send_to_tokenizer.send_output(AbortReq(rid=request.rid, finished_reason=reason), request)

    def get_internal_state(self, recv_req: GetInternalStateReq) -> GetInternalStateReqOutput:
        output = super().get_internal_state(recv_req)
        if self.enable_lora:
            output.internal_state[ADAPTERS_NOW] = adapters_now(self)
        return output

    def init_request_dispatcher(self) -> None:
        super().init_request_dispatcher()
        guarded = _GuardedDispatcher([])
        guarded += self._request_dispatcher
        self._request_dispatcher: TypeBasedDispatcher = guarded
