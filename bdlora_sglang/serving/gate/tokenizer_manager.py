"""SGLang's TokenizerManager, through which every request passes, with a gate before it."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from functools import partial
from http import HTTPStatus
from typing import Any

import fastapi
from fastapi import BackgroundTasks
from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
from sglang.srt.entrypoints.engine import init_tokenizer_manager
from sglang.srt.managers.io_struct import (
    BatchTokenizedEmbeddingReqInput,
    BatchTokenizedGenerateReqInput,
    LoadLoRAAdapterFromTensorsReqInput,
    LoadLoRAAdapterFromTensorsReqOutput,
    LoadLoRAAdapterReqInput,
    LoadLoRAAdapterReqOutput,
    ReleaseMemoryOccupationReqInput,
    ResumeMemoryOccupationReqInput,
    TokenizedEmbeddingReqInput,
    TokenizedGenerateReqInput,
    UnloadLoRAAdapterReqInput,
    UnloadLoRAAdapterReqOutput,
)
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.runtime_context import get_exec, get_lora, get_observability, get_parallel
from sglang.srt.server_args import PortArgs, ServerArgs

from bdlora_sglang.adapter.locate import adapter_folder, check_adapter_name
from bdlora_sglang.errors import BDLoRAError
from bdlora_sglang.serving.gate.adapter_folders import AdapterFolders
from bdlora_sglang.serving.gate.asked import asked_adapter
from bdlora_sglang.serving.gate.control import ReleasedMemory, check_control
from bdlora_sglang.serving.gate.errors import RequestError
from bdlora_sglang.serving.gate.names import ModelNames, base_names, check_not_the_base
from bdlora_sglang.serving.gate.registry import CountedRegistry
from bdlora_sglang.serving.gate.requests import Served, check_request
from bdlora_sglang.serving.gate.sampling import check_params
from bdlora_sglang.serving.gate.tokenized import check_tokenized
from bdlora_sglang.serving.options import GateOptions

# How often a request loads what others evict before it can use it.
_ATTEMPTS = 8


class GatedTokenizerManager(TokenizerManager):
    """Checks requests before SGLang sees them, and keeps the adapters that clients may name.

    It raises `RequestError`, which SGLang's endpoints answer with its status and message.
    """

    def __init__(self, server_args: ServerArgs, port_args: PortArgs, *, options: GateOptions, **kwargs: Any) -> None:
        self.gate_options = options
        self._folders = AdapterFolders(options.adapter_roots, options.adapters_from_hub)
        self._memory = ReleasedMemory()
        super().__init__(server_args, port_args, **kwargs)
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
        return tokenized

    async def _handle_abort_finish_reason(self, out: dict[Any, Any], state: Any, is_stream: bool) -> Any:
        reason = out["meta_info"]["finish_reason"]
        # A grammar that allows no token at all, such as one that only refers to itself: SGLang calls it its own fault.
        if "accept_token failed" in str(reason.get("message")) and "Accepted tokens: []" in reason["message"]:
            reason["status_code"] = int(HTTPStatus.BAD_REQUEST)
        return await super()._handle_abort_finish_reason(out, state, is_stream)

    # --- what steers the server --------------------------------------------------------------------------------

    def _dispatch_to_scheduler(self, obj: Any) -> None:
        if not isinstance(obj, _REQUESTS):
            check_control(obj)
        super()._dispatch_to_scheduler(obj)

    async def release_memory_occupation(
        self, obj: ReleaseMemoryOccupationReqInput, request: fastapi.Request | None = None
    ) -> None:
        check_control(obj)
        tags = self._memory.release(obj.tags)
        # From here on no request comes in. SGLang's scheduler ends unless it is idle, which flushing waits for.
        idle = not self.rid_to_state and (await self.flush_cache(timeout_s=_IDLE_SECONDS)).success
        if not idle:
            self._memory.resumed(tags)
            raise RequestError("server", "requests under way", "none, to release memory", HTTPStatus.CONFLICT)
        await super().release_memory_occupation(obj, request)

    async def resume_memory_occupation(
        self, obj: ResumeMemoryOccupationReqInput, request: fastapi.Request | None = None
    ) -> None:
        check_control(obj)
        tags = self._memory.resume(obj.tags)
        await super().resume_memory_occupation(obj, request)
        self._memory.resumed(tags)

    # --- adapters ----------------------------------------------------------------------------------------------

    def init_lora(self) -> None:
        super().init_lora()
        self.lora_registry = CountedRegistry(get_lora().lora_paths)
        # Held while adapters are loaded for a request, so that requests do not evict each other's.
        self._loading = asyncio.Lock()
        self.names = ModelNames(
            lambda: self.served_model_name,
            self._base_names,
            self._adapter_names,
            self.gate_options.allow_unknown_models,
        )

    def _base_names(self) -> frozenset[str]:
        return base_names(self.model_path, self.served_model_name, self.gate_options.aliases)

    def _adapter_names(self) -> set[str]:
        """Loaded ones, and those that ``--max-loaded-loras`` evicted: the next request loads them again."""
        if not self.enable_lora:
            return set()
        return self.lora_registry.get_all_adapters().keys() | self.lora_ref_cache.keys()

    async def load_lora_adapter(
        self, obj: LoadLoRAAdapterReqInput, request: fastapi.Request | None = None
    ) -> LoadLoRAAdapterReqOutput:
        try:
            self._check_new_adapter(obj.lora_name)
            # It may take long: downloads, network file systems. The ranks go on meanwhile.
            obj.lora_path = str(await asyncio.to_thread(self._folders.find, obj.lora_path))
        except BDLoRAError as error:
            return LoadLoRAAdapterReqOutput(success=False, error_message=str(error))
        return await super().load_lora_adapter(obj, request)

    async def load_lora_adapter_from_tensors(
        self, obj: LoadLoRAAdapterFromTensorsReqInput, request: fastapi.Request | None = None
    ) -> LoadLoRAAdapterFromTensorsReqOutput:
        try:
            self._check_new_adapter(obj.lora_name)
        except BDLoRAError as error:
            return LoadLoRAAdapterFromTensorsReqOutput(success=False, error_message=str(error))
        return await super().load_lora_adapter_from_tensors(obj, request)

    def _check_new_adapter(self, name: str) -> None:
        check_adapter_name(name)
        check_not_the_base(name, self._base_names())
        _check_one_replica()

    async def unload_lora_adapter(
        self, obj: UnloadLoRAAdapterReqInput, request: fastapi.Request | None = None
    ) -> UnloadLoRAAdapterReqOutput:
        try:
            _check_one_replica()
        except BDLoRAError as error:
            return UnloadLoRAAdapterReqOutput(success=False, error_message=str(error))
        if self.gate_options.reload_on_request or not self.enable_lora:
            return await super().unload_lora_adapter(obj, request)
        async with self._loading:
            # First of all: a request that comes while others still use it must not load it again.
            known = self.lora_ref_cache.pop(obj.lora_name, None)
            loaded = self.lora_registry.get_all_adapters()
            if known is not None and obj.lora_name not in loaded and obj.lora_name not in self.pending_lora_unloads:
                return UnloadLoRAAdapterReqOutput(success=True, loaded_adapters=_paths(loaded))
            return await super().unload_lora_adapter(obj, request)

    async def _resolve_lora_path(self, obj: Any) -> None:
        """Load what is not there, and count all as used; nothing is evicted in between."""
        names = {name for name in ([obj.lora_path] if isinstance(obj.lora_path, str) else obj.lora_path) if name}
        limit = get_lora().max_loaded_loras
        if limit is not None and len(names) > limit:
            raise RequestError("lora_path", f"{len(names)} adapters", f"at most --max-loaded-loras = {limit}")
        try:
            obj.lora_id = await self.lora_registry.acquire(obj.lora_path)
        except ValueError:
            async with self._loading:
                obj.lora_id = await self._load_and_acquire(obj.lora_path, names)
        for index, part in obj.__dict__.get("_sub_obj_cache", {}).items():
            part.lora_id = obj.lora_id[index] if isinstance(obj.lora_id, list) else obj.lora_id

    async def _load_and_acquire(self, lora_path: Any, names: set[str]) -> Any:
        for attempt in range(_ATTEMPTS):
            # Those asked for become the last to be evicted.
            for name in await self.lora_registry.get_unregistered_loras(names):
                await self._load_again(name)
            try:
                return await self.lora_registry.acquire(lora_path)
            except ValueError:
                # Another client loads adapters, which evicts these.
                if attempt == _ATTEMPTS - 1:
                    raise
        return None

    async def _load_again(self, name: str) -> None:
        ref = self.lora_ref_cache.get(name)
        if ref is None:
            raise RequestError("lora_path", name, "a loaded adapter, as /v1/models lists them", HTTPStatus.NOT_FOUND)
        # Loaded before, so allowed; a repo id given at start is found in the cache.
        folder = await asyncio.to_thread(adapter_folder, ref.lora_path)
        result = await super().load_lora_adapter(
            LoadLoRAAdapterReqInput(lora_name=name, lora_path=str(folder), pinned=ref.pinned)
        )
        if not result.success and name not in self.lora_registry.get_all_adapters():
            raise BDLoRAError(f"adapter '{name}': could not be loaded again: {result.error_message}")


_REQUESTS = (
    *(TokenizedGenerateReqInput, BatchTokenizedGenerateReqInput),
    *(TokenizedEmbeddingReqInput, BatchTokenizedEmbeddingReqInput),
)
_IDLE_SECONDS = 5.0


def _is_native(request: fastapi.Request | None) -> bool:
    """Whether a request comes from an endpoint of SGLang's own, whose body is the request itself."""
    return request is not None and request.scope.get("path", "").endswith(("generate", "/encode", "/classify"))


def _paths(adapters: Any) -> dict[str, str]:
    return {name: ref.lora_path for name, ref in adapters.items()}


def _check_one_replica() -> None:
    if get_parallel().dp_size != 1:
        raise BDLoRAError(
            f"--dp-size: found {get_parallel().dp_size}, expected 1 to load or unload adapters while the server runs; "
            "name them at start"
        )


def gated_tokenizer_manager(options: GateOptions) -> Callable[..., Any]:
    """What SGLang's ``init_tokenizer_manager_func`` expects."""
    return partial(init_tokenizer_manager, TokenizerManagerClass=partial(GatedTokenizerManager, options=options))
