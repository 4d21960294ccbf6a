"""A scheduler that measures itself: what it holds, what SGLang's own pool would hold, and that SGLang is as it was."""

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from sglang.srt.lora.mem_pool import LoRAMemoryPool
from sglang.srt.runtime_context import get_parallel

from bdlora_kernels import DeviceSlots
from bdlora_sglang.serving.kernels import choose_kernels
from bdlora_sglang.serving.local_adapter import LocalAdapter
from bdlora_sglang.serving.manager import BDLoRAManager
from bdlora_sglang.serving.pool import BDLoRAMemoryPool, slot_sizes_for_adapters
from bdlora_sglang.serving.scheduler import BDLoRAScheduler, BDLoRATpWorker
from tests.serving.snapshot import changed, sglang_objects

PROBE_FOLDER = "BDLORA_TEST_PROBE_FOLDER"


# In the probe folder: while it is there, an adapter of that name is not read.
HOLD_FILE = "hold"


class HoldingTpWorker(BDLoRATpWorker):
    """Reads an adapter as slowly as a test wants."""

    def load_lora_adapter(self, recv_req: Any) -> Any:
        while recv_req.lora_name == HOLD_FILE and (Path(os.environ[PROBE_FOLDER]) / HOLD_FILE).exists():
            time.sleep(0.01)
        return super().load_lora_adapter(recv_req)


class ProbedScheduler(BDLoRAScheduler):
    """Writes ``rank<N>.json`` and ``cores<N>.json`` before it serves, ``changed<N>.json`` then and at each unload.

    With the latter ``replayed<N>.json``, too.
    """

    worker_class = HoldingTpWorker

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._sglang_before = sglang_objects()
        super().__init__(*args, **kwargs)

    def run_event_loop(self) -> None:
        self._report("rank", self._measure())
        self._report("cores", _cores())
        self._report("gpu_slots", self._gpu_slots())
        self._report("changed", changed(self._sglang_before, sglang_objects()))
        super().run_event_loop()

    def unload_lora_adapter(self, recv_req: Any) -> Any:
        result = super().unload_lora_adapter(recv_req)
        # By now requests have run: this is the report of a scheduler that has served.
        self._report("changed", changed(self._sglang_before, sglang_objects()))
        self._report("replayed", self.tp_worker.model_runner.eager_runner.replayed_kinds)
        return result

    def _report(self, what: str, content: Any) -> None:
        path = Path(os.environ[PROBE_FOLDER]) / f"{what}{get_parallel().tp_rank}.json"
        # Renamed, because the test reads it when the first rank has answered, and this one may be a moment later.
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(content))
        partial.replace(path)

    def _measure(self) -> dict[str, dict[str, int]]:
        return {lora.plan.name: self._measure_adapter(lora) for lora in self._manager.loras.values()}

    def _gpu_slots(self) -> dict[str, int]:
        """What this pool's slots would take on a GPU."""
        pool, manager = self._manager.memory_pool, self._manager
        slots = DeviceSlots(
            pool.max_loras_per_batch, manager._slot_sizes(), manager.dtype, torch.device("meta"), pin_memory=False
        )
        return {"slots": pool.max_loras_per_batch, "slot_bytes": slots.slot_bytes}

    @property
    def _manager(self) -> BDLoRAManager:
        return self.tp_worker.model_runner.lora_manager

    def _measure_adapter(self, lora: LocalAdapter) -> dict[str, int]:
        """Bytes of this adapter on this rank: read, on the host, and in pools for it alone, ours and SGLang's."""
        manager = self._manager
        common = {
            "base_hf_config": manager.base_hf_config,
            "max_loras_per_batch": 1,
            "dtype": manager.dtype,
            "max_lora_rank": lora.plan.rank,
            "target_modules": manager.target_modules,
            "base_model": manager.base_model,
            "eviction_policy": manager.eviction_policy,
            "lora_added_tokens_size": 0,
        }
        sizes = slot_sizes_for_adapters([name for layer in manager.lora_modules for name in layer], [lora.plan])
        kernels = choose_kernels(manager.device, 1, exchanges=manager.sharding.exchanges)
        ours = BDLoRAMemoryPool(slot_sizes=sizes, sharding=manager.sharding, kernels=kernels, **common)
        theirs = LoRAMemoryPool(**common)
        buffers = [*theirs.A_buffer.values(), *theirs.B_buffer.values()]
        return {
            "bytes_read": lora.bytes_read,
            "host_bytes": lora.num_bytes,
            "pool_bytes": ours.slots.slot_bytes,
            "sglang_pool_bytes": sum(tensor.nbytes for by_layer in buffers for tensor in by_layer),
        }


def _cores() -> dict[str, Any]:
    """Threads of parallel regions, and the cores that the threads of this process may run on."""
    threads = [int(thread.name) for thread in Path("/proc/self/task").iterdir()]
    affinities = {tuple(sorted(os.sched_getaffinity(thread))) for thread in threads}
    return {"threads": torch.get_num_threads(), "affinities": sorted(affinities)}
