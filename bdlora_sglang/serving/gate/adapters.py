"""The adapters that clients may name: loaded, evicted, loaded again, unloaded."""

import asyncio
import logging
import time
from http import HTTPStatus
from typing import Any

import fastapi
from sglang.srt.managers.io_struct import (
    LoadLoRAAdapterFromTensorsReqInput,
    LoadLoRAAdapterFromTensorsReqOutput,
    LoadLoRAAdapterReqInput,
    LoadLoRAAdapterReqOutput,
    UnloadLoRAAdapterReqInput,
    UnloadLoRAAdapterReqOutput,
)
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.runtime_context import get_lora, get_parallel
from sglang.srt.server_args import PortArgs, ServerArgs

from bdlora_sglang.adapter.locate import check_adapter_name
from bdlora_sglang.errors import BDLoRAError
from bdlora_sglang.serving.gate.adapter_folders import AdapterFolders
from bdlora_sglang.serving.gate.errors import RequestError
from bdlora_sglang.serving.gate.metrics import AdapterCounts
from bdlora_sglang.serving.gate.names import ModelNames, base_names, check_not_the_base
from bdlora_sglang.serving.gate.registry import CountedRegistry
from bdlora_sglang.serving.options import GateOptions

logger = logging.getLogger(__name__)

# How often a request loads what others evict before it can use it.
_ATTEMPTS = 8


# SGLang's path for those that came as tensors, and cannot come again.
_FROM_TENSORS = "__tensor__"


class AdapterKeeper(TokenizerManager):
    """SGLang's TokenizerManager, with adapters that go by rules: names, folders, what is loaded and what is gone."""

    def __init__(self, server_args: ServerArgs, port_args: PortArgs, *, options: GateOptions, **kwargs: Any) -> None:
        self.gate_options = options
        self.adapter_counts = AdapterCounts()
        self._folders = AdapterFolders(options.adapter_roots, options.adapters_from_hub)
        super().__init__(server_args, port_args, **kwargs)

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
        evicted = {name for name, ref in self.lora_ref_cache.items() if ref.lora_path != _FROM_TENSORS}
        return self.lora_registry.get_all_adapters().keys() | evicted

    async def load_lora_adapter(
        self, obj: LoadLoRAAdapterReqInput, request: fastapi.Request | None = None
    ) -> LoadLoRAAdapterReqOutput:
        try:
            self._check_new_adapter(obj.lora_name)
            # It may take long: downloads, network file systems. The ranks go on meanwhile.
            folder = await asyncio.to_thread(self._folders.find, obj.lora_path)
            # Other nodes may have it elsewhere, under the same name.
            if self.server_args.nnodes == 1:
                obj.lora_path = str(folder)
        except BDLoRAError as error:
            logger.warning("Adapter %r is refused: %s", obj.lora_name, error)
            return LoadLoRAAdapterReqOutput(success=False, error_message=str(error))
        return await self._load(obj)

    async def _load(self, obj: LoadLoRAAdapterReqInput) -> LoadLoRAAdapterReqOutput:
        before = set(self.lora_registry.get_all_adapters())
        start = time.perf_counter()
        result = await super().load_lora_adapter(obj)
        seconds = time.perf_counter() - start
        if result.success:
            self.adapter_counts.loaded(obj.lora_name, seconds)
            logger.info("Adapter %r is loaded from %s, in %.3f s.", obj.lora_name, obj.lora_path, seconds)
        else:
            logger.warning("Adapter %r is refused: %s", obj.lora_name, result.error_message)
        for evicted in sorted(before - self.lora_registry.get_all_adapters().keys()):
            logger.info("Adapter %r made room on the host for %r.", evicted, obj.lora_name)
        return result

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
        if ref is None or ref.lora_path == _FROM_TENSORS:
            raise RequestError("lora_path", name, "a loaded adapter, as /v1/models lists them", HTTPStatus.NOT_FOUND)
        # Loaded before, so allowed.
        result = await self._load(LoadLoRAAdapterReqInput(lora_name=name, lora_path=ref.lora_path, pinned=ref.pinned))
        if not result.success and name not in self.lora_registry.get_all_adapters():
            raise BDLoRAError(f"adapter '{name}': could not be loaded again: {result.error_message}")


def _paths(adapters: Any) -> dict[str, str]:
    return {name: ref.lora_path for name, ref in adapters.items()}


def _check_one_replica() -> None:
    if get_parallel().dp_size != 1:
        raise BDLoRAError(
            f"--dp-size: found {get_parallel().dp_size}, expected 1 to load or unload adapters while the server runs; "
            "name them at start"
        )
