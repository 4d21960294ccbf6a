"""From SGLang's scheduler down to our LoRA manager, one small override a class, and the proof that it is in use."""

import logging
from typing import Any

import torch
from sglang.srt.configs.update_config import update_config
from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.managers.io_struct import (
    GetWeightsByNameReqInput,
    LoadLoRAAdapterFromTensorsReqInput,
    LoadLoRAAdapterReqInput,
    LoRAUpdateOutput,
    UnloadLoRAAdapterReqInput,
)
from sglang.srt.managers.scheduler_components.request_receiver import SchedulerRequestReceiver
from sglang.srt.managers.tp_worker import TpModelWorker
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.runtime_context import get_device, get_lora, get_parallel, get_schedule
from sglang.srt.utils import is_cpu
from sglang.utils import TypeBasedDispatcher

from bdlora_sglang.errors import BDLoRAError
from bdlora_sglang.serving.adapter_loader import AdapterLoader, FinishAdapterLoad, gather_errors, use_device
from bdlora_sglang.serving.backend import BDLoRABackend
from bdlora_sglang.serving.cpu.decode_runner import RecordingRunner
from bdlora_sglang.serving.cpu.linear import unpacked
from bdlora_sglang.serving.cpu.requests import request_receiver_over_shared_memory
from bdlora_sglang.serving.gate.scheduler import GuardedScheduler
from bdlora_sglang.serving.hardware import on_cpu_platform
from bdlora_sglang.serving.kernels import give_back_host_memory
from bdlora_sglang.serving.layers import WRAPPERS
from bdlora_sglang.serving.manager import BDLoRAManager, ReadAdapter
from bdlora_sglang.serving.options import ServingOptions
from bdlora_sglang.serving.pool import BDLoRAMemoryPool
from bdlora_sglang.serving.proof import prove_deltas

logger = logging.getLogger(__name__)

# Those that SGLang pads in a model's config on the CPU (``configs/update_config.py``).
_HEAD_COUNTS = ("num_attention_heads", "num_key_value_heads", "swa_num_attention_heads", "swa_num_key_value_heads")

# A rank that has nothing else to do looks so often whether an adapter is there.
_LOADING_POLL_SECONDS = 0.002


class BDLoRAModelRunner(ModelRunner):
    """Builds `BDLoRAManager`, and on the CPU splits heads as on a GPU."""

    def __init__(self, *args: Any, options: ServingOptions, **kwargs: Any) -> None:
        self.options = options
        super().__init__(*args, **kwargs)

    def load_model(self) -> None:
        self._head_counts = self._read_head_counts()
        super().load_model()

    def _load_format_scope(self, load_format: str | None) -> Any:
        # SGLang calls this after it has padded the head counts of any model on a "cpu", and before it builds the model.
        # Only its own CPU build loads weights into padded heads. Without it the counts must be the model's own: fewer
        # KV heads than ranks are then replicated.
        if self.device == "cpu" and not is_cpu():
            for config, counts in self._head_counts:
                for name in _HEAD_COUNTS:
                    if name in counts:
                        update_config(config, name, counts[name])
                    elif hasattr(config, name):
                        delattr(config, name)
        return super()._load_format_scope(load_format)

    def init_cuda_graphs(self, *args: Any, **kwargs: Any) -> None:
        super().init_cuda_graphs(*args, **kwargs)
        if on_cpu_platform() and self.spec_algorithm.is_none():
            self.eager_runner = RecordingRunner(self)

    def _read_head_counts(self) -> list[tuple[object, dict[str, object]]]:
        configs = (self.model_config, self.model_config.hf_config, self.model_config.hf_text_config)
        return [(c, {name: getattr(c, name) for name in _HEAD_COUNTS if hasattr(c, name)}) for c in configs]

    def _preprocess_logits(self, logits_output: Any, sampling_info: Any, *args: Any, **kwargs: Any) -> Any:
        state = super()._preprocess_logits(logits_output, sampling_info, *args, **kwargs)
        if sampling_info.grammars:
            # Where a grammar leaves no token, sampling would end the scheduler. Any token will do: the grammar refuses
            # it, and SGLang ends that request alone.
            logits_RV = logits_output.next_token_logits
            logits_RV.masked_fill_((logits_RV == -torch.inf).all(dim=-1, keepdim=True), 0.0)
        return state

    def check_weights(self, *args: Any, **kwargs: Any) -> Any:
        with unpacked(self.model):
            return super().check_weights(*args, **kwargs)

    def load_lora_adapter(self, lora_ref: LoRARef) -> ReadAdapter:
        return self.lora_manager.read(lora_ref)

    def load_lora_adapter_from_tensors(self, lora_ref: LoRARef, *arguments: Any) -> ReadAdapter:
        return self.lora_manager.read_from_tensors(lora_ref, *arguments)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if self.lora_manager is not None:
            self.lora_manager.memory_pool.guard.forward_launched()
        return output

    def init_lora_manager(self) -> None:
        self.lora_manager = BDLoRAManager(
            base_model=self.model,
            base_hf_config=self.model_config.hf_config,
            max_loras_per_batch=get_lora().max_loras_per_batch,
            load_config=self.load_config,
            dtype=self.dtype,
            server_args=self.server_args,
            max_lora_rank=get_lora().max_lora_rank,
            target_modules=get_lora().lora_target_modules,
            lora_paths=get_lora().lora_paths,
            options=self.options,
        )


class BDLoRATpWorker(TpModelWorker):
    """Builds `BDLoRAModelRunner`. What SGLang calls loading an adapter only reads it here (`BDLoRAManager.read`)."""

    def __init__(self, *args: Any, options: ServingOptions, **kwargs: Any) -> None:
        self.options = options
        super().__init__(*args, **kwargs)

    def _init_model_runner(self) -> None:
        self._model_runner = BDLoRAModelRunner(
            model_config=self.model_config,
            mem_fraction_static=get_schedule().mem_fraction_static,
            gpu_id=self.gpu_id,
            nccl_port=self.nccl_port,
            server_args=self.server_args,
            is_draft_worker=self.is_draft_worker,
            req_to_token_pool=self.req_to_token_pool,
            token_to_kv_pool_allocator=self.token_to_kv_pool_allocator,
            memory_pool_config=self.memory_pool_config,
            draft_attention_backend=self.draft_attention_backend,
            load_group=self.load_group,
            options=self.options,
        )

    def get_weights_by_name(self, recv_req: GetWeightsByNameReqInput) -> Any:
        with unpacked(self.model_runner.model):
            return super().get_weights_by_name(recv_req)


class BDLoRAScheduler(GuardedScheduler):
    """Builds `BDLoRATpWorker`, and refuses to start unless BD-LoRA is really in place."""

    worker_class = BDLoRATpWorker

    def __init__(self, *args: Any, options: ServingOptions, **kwargs: Any) -> None:
        self.options = options
        super().__init__(*args, **kwargs)
        if self.enable_lora:
            prove_in_place(self.tp_worker.model_runner)
            manager = self.tp_worker.model_runner.lora_manager
            manager.kernels.compile(_tell_progress)
            logger.info(f"BD-LoRA is proven in {', '.join(prove_deltas(manager))}.")

    def init_request_receiver(self) -> None:
        super().init_request_receiver()
        if on_cpu_platform():
            self.request_receiver: SchedulerRequestReceiver = request_receiver_over_shared_memory(self.request_receiver)

    def can_schedule_lora_req(self, req: Any, running_loras: set[str | None]) -> bool:
        # SGLang's loader would wait for a slot that holds the base model.
        if req.lora_id is None:
            return self.lora_drainer is None or self.lora_drainer.can_schedule(req)
        return super().can_schedule_lora_req(req, running_loras)

    # --- adapters are read beside the forward: see adapter_loader.py ---------------------------------------------

    def init_request_dispatcher(self) -> None:
        super().init_request_dispatcher()
        self._request_dispatcher += TypeBasedDispatcher([(FinishAdapterLoad, self.finish_adapter_load)])
        device, index = torch.device(self.tp_worker.model_runner.device), get_device().gpu_id
        self.adapter_loader: AdapterLoader[ReadAdapter] = AdapterLoader(
            gather_errors(get_parallel().tp_group.ranks), lambda: use_device(device, index)
        )

    def load_lora_adapter(self, recv_req: LoadLoRAAdapterReqInput) -> None:
        self.adapter_loader.start(recv_req.lora_id, recv_req, lambda: self.tp_worker.load_lora_adapter(recv_req))

    def load_lora_adapter_from_tensors(self, recv_req: LoadLoRAAdapterFromTensorsReqInput) -> None:
        self.adapter_loader.start(
            recv_req.lora_id, recv_req, lambda: self.tp_worker.load_lora_adapter_from_tensors(recv_req)
        )

    def _poll_timeout_aborts(self) -> list[Any]:
        # What this gives, on rank 0 and in every step, goes to all ranks with the requests of the step.
        return [*super()._poll_timeout_aborts(), *self.adapter_loader.finished()]

    def finish_adapter_load(self, message: FinishAdapterLoad) -> None:
        """Take an adapter over, or not, on all ranks; only now the client is answered."""
        request, loaded = self.adapter_loader.take(message)
        ref, manager = request.to_ref(), self.tp_worker.model_runner.lora_manager
        error = loaded.exception()
        if error is None:
            result = manager.take_over(ref, loaded.result())
        else:
            result = manager.create_lora_update_result(success=False, error_message=str(error))
        if result.success:
            self.kv_event_lora_names.register(lora_id=ref.lora_id, lora_name=ref.lora_name)
        self.send_control_output(result, request)

    def unload_lora_adapter(self, recv_req: UnloadLoRAAdapterReqInput) -> LoRAUpdateOutput:
        result = super().unload_lora_adapter(recv_req)
        self.adapter_loader.do(give_back_host_memory)
        return result

    def maybe_sleep_on_idle(self) -> None:
        if self.adapter_loader.is_busy:
            self.adapter_loader.wait(_LOADING_POLL_SECONDS)
        else:
            super().maybe_sleep_on_idle()

    def init_tp_model_worker(self) -> None:
        self.tp_worker = self.worker_class(
            server_args=self.server_args,
            gpu_id=get_device().gpu_id,
            nccl_port=self.nccl_port,
            options=self.options,
        )


def _tell_progress(done: int, total: int) -> None:
    logger.info(f"BD-LoRA kernels are compiled for {done} of {total} kinds of layers.")


def prove_in_place(model_runner: ModelRunner) -> int:
    """The number of layers that BD-LoRA serves; raises `BDLoRAError` when SGLang built any LoRA class of its own."""
    manager = model_runner.lora_manager
    layers = [layer for by_name in getattr(manager, "lora_modules", ()) for layer in by_name.values()]
    expected: list[tuple[object, type | tuple[type, ...]]] = [
        (model_runner, BDLoRAModelRunner),
        (manager, BDLoRAManager),
        (getattr(manager, "memory_pool", None), BDLoRAMemoryPool),
        (getattr(manager, "lora_backend", None), BDLoRABackend),
        *((layer, WRAPPERS) for layer in layers),
    ]
    for found, kind in expected:
        if not isinstance(found, kind):
            raise BDLoRAError(f"BD-LoRA is not in place: found a {type(found).__name__}, expected {kind}")
    if not layers:
        raise BDLoRAError("BD-LoRA is not in place: found no LoRA layer, expected at least one target module")
    return len(layers)
