"""A scheduler that measures itself: what it holds, what SGLang's own pool would hold, and that SGLang is as it was."""

import inspect
import json
import os
import sys
from pathlib import Path
from typing import Any

from bdlora_sglang.serving.scheduler import BDLoRAScheduler

PROBE_FOLDER = "BDLORA_TEST_PROBE_FOLDER"

# SGLang replaces this function of its own when it starts a scheduler.
_REPLACED_BY_SGLANG = {"sglang.srt.distributed.device_communicators.custom_all_reduce_utils.gpu_p2p_access_check"}


def sglang_objects() -> dict[str, object]:
    """Every function and class of SGLang's loaded modules, and every attribute of its classes, by name."""
    found: dict[str, object] = {}
    for module_name, module in sorted(sys.modules.items()):
        if module is None or not module_name.startswith("sglang"):
            continue
        for name, value in vars(module).copy().items():
            if inspect.isfunction(value) or inspect.isclass(value):
                found[f"{module_name}.{name}"] = value
            if inspect.isclass(value) and value.__module__.startswith("sglang"):
                for attribute, member in vars(value).copy().items():
                    if callable(member) or isinstance(member, classmethod | staticmethod | property):
                        found[f"{module_name}.{name}.{attribute}"] = member
    return found


def changed(before: dict[str, object], after: dict[str, object]) -> list[str]:
    differ = {name for name, value in before.items() if after.get(name) is not value}
    return sorted(differ - _REPLACED_BY_SGLANG)


class ProbedScheduler(BDLoRAScheduler):
    """Writes ``rank<N>.json`` before it serves, and ``changed<N>.json`` when it stops."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._sglang_before = sglang_objects()
        super().__init__(*args, **kwargs)

    def run_event_loop(self) -> None:
        from sglang.srt.runtime_context import get_parallel

        folder, rank = Path(os.environ[PROBE_FOLDER]), get_parallel().tp_rank
        (folder / f"rank{rank}.json").write_text(json.dumps(self._measure()))
        self._report_changes(folder, rank)
        super().run_event_loop()

    def _report_changes(self, folder: Path, rank: int) -> None:
        (folder / f"changed{rank}.json").write_text(json.dumps(changed(self._sglang_before, sglang_objects())))

    def unload_lora_adapter(self, recv_req: Any) -> Any:
        # By now requests have run: the last report is of a scheduler that has served.
        from sglang.srt.runtime_context import get_parallel

        result = super().unload_lora_adapter(recv_req)
        self._report_changes(Path(os.environ[PROBE_FOLDER]), get_parallel().tp_rank)
        return result

    def _measure(self) -> dict[str, Any]:
        from sglang.srt.lora.mem_pool import LoRAMemoryPool

        manager = self.tp_worker.model_runner.lora_manager
        own = LoRAMemoryPool(
            base_hf_config=manager.base_hf_config,
            max_loras_per_batch=manager.max_loras_per_batch,
            dtype=manager.dtype,
            max_lora_rank=manager.max_lora_rank,
            target_modules=manager.target_modules,
            base_model=manager.base_model,
            eviction_policy=manager.eviction_policy,
            lora_added_tokens_size=0,
        )
        buffers = [*own.A_buffer.values(), *own.B_buffer.values()]
        sglang_bytes = sum(tensor.nbytes for by_layer in buffers for tensor in by_layer)
        bdlora_bytes = sum(f.a_SE.nbytes + f.b_SE.nbytes for f in manager.memory_pool.factors.values())
        return {
            "sglang_pool_bytes": sglang_bytes,
            "bdlora_pool_bytes": bdlora_bytes,
            "adapters": {
                lora.name: {"host_bytes": lora.num_bytes, "bytes_read": lora.bytes_read}
                for lora in manager.loras.values()
            },
        }
