"""What a server would take of a GPU's memory, by the model's config alone: no weights, no processes, no GPU.

SGLang's own classes build the model of every rank on torch's meta device, and `BDLoRAManager` sizes the slots as in a
server. To be called in a process that has set `PLATFORM_NAME` before it imported SGLang, and that serves nothing.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.arg_groups.overrides import model_config_of, resolving_view
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.model_loader.loader import DefaultModelLoader
from sglang.srt.runtime_context import SpawnRanks, create_context, get_lora, use_context
from sglang.srt.server_args import ServerArgs

from bdlora_kernels import SlotSize
from bdlora_sglang.errors import BDLoRAError
from bdlora_sglang.serving.checks import resolve
from bdlora_sglang.serving.feature import check_features
from bdlora_sglang.serving.features import FEATURES
from bdlora_sglang.serving.kernels import BatchLimits, LayerShape
from bdlora_sglang.serving.limits import batch_limits
from bdlora_sglang.serving.local_adapter import LocalAdapter
from bdlora_sglang.serving.manager import BDLoRAManager
from bdlora_sglang.serving.options import ServingOptions
from bdlora_sglang.serving.triton_kernels import TritonKernels


@dataclass(frozen=True)
class MemoryPlan:
    """Of the rank that takes the most, in bytes; ``scratch_bytes`` and the tables of batches of ``batch_tokens``.

    ``kv_token_bytes`` is None for a cache that is no K and V a head.
    """

    tp_size: int
    num_slots: int
    slot_bytes: int
    scratch_bytes: int
    weight_bytes: int
    kv_token_bytes: int | None
    batch_tokens: int
    adapters: Sequence[LocalAdapter]

    @property
    def pool_bytes(self) -> int:
        return self.num_slots * self.slot_bytes

    def kv_tokens(self, budget_bytes: float) -> int:
        """Tokens of KV cache that are left of what a GPU gives for weights, slots and cache."""
        assert self.kv_token_bytes is not None
        return max(
            0, int((budget_bytes - self.weight_bytes - self.pool_bytes - self.scratch_bytes) // self.kv_token_bytes)
        )

    def slots_that_fit(self, budget_bytes: float, kv_tokens: int) -> int:
        """The most slots that leave so many tokens of KV cache."""
        assert self.kv_token_bytes is not None
        left = budget_bytes - self.weight_bytes - self.scratch_bytes - kv_tokens * self.kv_token_bytes
        return max(0, int(left // self.slot_bytes)) if self.slot_bytes else 0


def plan_memory(server_args: ServerArgs, options: ServingOptions) -> MemoryPlan:
    """Work it out for unresolved arguments; raises `BDLoRAError` as a start does."""
    # On a "cpu" SGLang pads the config while it resolves.
    config = deepcopy(model_config_of(server_args))
    resolve(server_args)
    check_features(FEATURES, resolving_view(server_args), with_lora=True, on_cpu=False)
    try:
        server_args.check_server_args()
    except (AssertionError, ValueError) as error:
        raise BDLoRAError(f"SGLang refuses its arguments: {error}") from error
    try:
        ranks = [_plan_rank(server_args, options, config, rank) for rank in range(server_args.tp_size)]
    except AssertionError as error:  # how SGLang refuses arguments of LoRA
        raise BDLoRAError(f"SGLang refuses its arguments: {error}") from error
    sizes = {name: SlotSize.largest(rank.slot_sizes[name] for rank in ranks) for name in ranks[0].slot_sizes}
    first = ranks[0]
    num_slots = first.manager.max_loras_per_batch
    # On a GPU these are the kernels, and on the meta device they take no memory.
    kernels = TritonKernels(torch.device("meta"), num_slots)
    slots = kernels.allocate(num_slots, sizes, first.manager.dtype)
    return MemoryPlan(
        tp_size=server_args.tp_size,
        num_slots=num_slots,
        slot_bytes=slots.slot_bytes,
        scratch_bytes=kernels.reserve(dict.fromkeys(sizes, LayerShape(0, 0)), first.limits),
        weight_bytes=max(rank.weight_bytes for rank in ranks),
        kv_token_bytes=_kv_token_bytes(config, server_args),
        batch_tokens=first.limits.tokens,
        adapters=max((list(rank.manager.loras.values()) for rank in ranks), key=_num_bytes),
    )


@dataclass(frozen=True)
class _Rank:
    manager: "_PlanningManager"
    weight_bytes: int
    limits: BatchLimits

    @property
    def slot_sizes(self) -> Mapping[str, SlotSize]:
        return self.manager.slot_sizes


class _PlanningManager(BDLoRAManager):
    """Stops when it knows the size of its slots."""

    slot_sizes: Mapping[str, SlotSize]

    def init_memory_pool(self) -> None:
        self.slot_sizes = self._slot_sizes()

    def update_lora_info(self) -> None:
        pass


class _Group:
    """What models ask of a process group while they are built, of one that is not there."""

    cpu_group = device_group = None

    def __init__(self, rank: int, size: int) -> None:
        self.rank_in_group, self.world_size = rank, size
        self.is_first_rank, self.is_last_rank = rank == 0, rank == size - 1

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value]


def _plan_rank(server_args: ServerArgs, options: ServingOptions, config: Any, rank: int) -> _Rank:
    context = create_context(server_args, role="scheduler", ranks=SpawnRanks(world_rank=rank, dp_rank=None, gpu_id=0))
    tp_group = _Group(rank, server_args.tp_size)
    groups = {"tp_group": tp_group, "attn_tp_group": tp_group, "moe_tp_group": tp_group, "pp_group": _Group(0, 1)}
    with use_context(context), context.parallel.override(**groups):
        load_config = LoadConfig()
        model = DefaultModelLoader(load_config).initialize_model_for_startup(
            model_config=deepcopy(config), device_config=SimpleNamespace(device="meta")
        )
        weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
        manager = _PlanningManager(
            base_model=model,
            base_hf_config=config.hf_config,
            max_loras_per_batch=get_lora().max_loras_per_batch,
            load_config=load_config,
            dtype=config.dtype,
            server_args=server_args,
            max_lora_rank=get_lora().max_lora_rank,
            target_modules=get_lora().lora_target_modules,
            lora_paths=get_lora().lora_paths,
            options=options,
        )
        return _Rank(manager, weight_bytes, batch_limits())


def _kv_token_bytes(config: Any, server_args: ServerArgs) -> int | None:
    """SGLang: ``MHATokenToKVPool``, K and V of each layer."""
    if getattr(config, "kv_lora_rank", None) is not None or config.is_hybrid_swa:
        return None
    heads = config.get_num_kv_heads(server_args.tp_size)
    itemsize = config.dtype.itemsize if server_args.kv_cache_dtype == "auto" else 1
    return int(config.num_hidden_layers * heads * (config.head_dim + config.v_head_dim) * itemsize)


def _num_bytes(adapters: Sequence[LocalAdapter]) -> int:
    return sum(adapter.num_bytes for adapter in adapters)
