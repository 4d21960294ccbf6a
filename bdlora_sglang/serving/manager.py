"""The LoRA manager: loads adapters, checks them against the base model, and sizes the pool."""

import logging
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from sglang.srt.lora.layers import BaseLayerWithLoRA
from sglang.srt.lora.lora_config import LoRAConfig
from sglang.srt.lora.lora_manager import LoRAManager
from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.lora.utils import get_normalized_target_modules
from sglang.srt.managers.io_struct import LoRAUpdateOutput
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.runtime_context import get_exec, get_parallel
from sglang.srt.utils import replace_submodule

from bdlora_kernels import HostBlock, SlotSize
from bdlora_sglang.adapter import Adapter
from bdlora_sglang.adapter.json_file import checked_tokens, read_json
from bdlora_sglang.adapter.locate import adapter_folder, check_adapter_name
from bdlora_sglang.errors import BDLoRAError
from bdlora_sglang.serving.backend import BACKEND_NAME
from bdlora_sglang.serving.communication_free import CommunicationFree
from bdlora_sglang.serving.fully_sharded import FullySharded
from bdlora_sglang.serving.kernels import NO_SLOT, choose_kernels
from bdlora_sglang.serving.layers import wrap_layer
from bdlora_sglang.serving.limits import batch_limits
from bdlora_sglang.serving.local_adapter import LocalAdapter, plan_adapter, read_adapter
from bdlora_sglang.serving.options import LoRASharding, ServingOptions
from bdlora_sglang.serving.pool import BDLoRAMemoryPool, slot_sizes_for_adapters
from bdlora_sglang.serving.saved_weights import check_saved_weights, skip_or_refuse
from bdlora_sglang.serving.served_modules import VOCABULARY, layer_kind, served_modules
from bdlora_sglang.serving.sharding import ExpertProjection, Sharding
from bdlora_sglang.serving.sizes import format_bytes

SHARDINGS: dict[LoRASharding, Sharding] = {
    LoRASharding.COMMUNICATION_FREE: CommunicationFree(),
    LoRASharding.FULLY_SHARDED: FullySharded(),
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReadAdapter:
    """An adapter that is read and checked, and that no request may name yet."""

    config: LoRAConfig
    local: LocalAdapter


class BDLoRAManager(LoRAManager):
    """SGLang's manager with BD-LoRA's layers, pool and adapters.

    ``loras`` maps SGLang's adapter ids to `LocalAdapter`; ``base_model`` and the other arguments are SGLang's.
    """

    def __init__(self, *args: Any, options: ServingOptions, **kwargs: Any) -> None:
        self.options = options
        self.sharding = SHARDINGS[options.lora_sharding]
        self.loras: dict[str, LocalAdapter]
        self._hf_config = kwargs["base_hf_config"]  # SGLang keeps that of the language model
        super().__init__(*args, lora_backend=BACKEND_NAME, **kwargs)

    # --- loading ---------------------------------------------------------------------------------------------

    def init_lora_adapters(self, lora_paths: list[LoRARef] | None = None) -> None:
        refused: dict[str, str] = {}
        no_experts = self.kernels.no_experts
        if self.sharding.exchanges:
            no_experts = "--lora-sharding fully-sharded is for linear layers of the decoder"
            refused = dict.fromkeys(VOCABULARY, no_experts)
        self.served = served_modules(self.base_model, self._hf_config, refused, no_experts)
        super().init_lora_adapters(lora_paths)

    def _load_lora_adapter(self, lora_ref: LoRARef) -> LoRAUpdateOutput:
        """Read and take over at once, as at the start."""
        try:
            return self.take_over(lora_ref, self.read(lora_ref))
        except Exception as error:
            return self.create_lora_update_result(success=False, error_message=str(error) or repr(error))

    def read(self, ref: LoRARef) -> ReadAdapter:
        """This rank's part of an adapter. Changes nothing, so that another thread than the scheduler's may call it.

        Raises:
            BDLoRAError: the adapter is not one that this server can serve.
        """
        # SGLang calls an adapter by its path when the user gave no name.
        if ref.lora_name != ref.lora_path:
            check_adapter_name(ref.lora_name)
        folder = adapter_folder(ref.lora_path)
        adapter = Adapter.open(folder, self.base_hf_config.model_type)
        return self._read(ref, adapter, _read_added_tokens(folder))

    def read_from_tensors(
        self,
        ref: LoRARef,
        tensors: Mapping[str, torch.Tensor],
        config_dict: Mapping[str, object],
        added_tokens_config: Mapping[str, int] | None = None,
    ) -> ReadAdapter:
        """The same for tensors in memory, under PEFT's names."""
        check_adapter_name(ref.lora_name)
        name = f"adapter '{ref.lora_name}'"
        adapter = Adapter.from_tensors(tensors, config_dict, name, self.base_hf_config.model_type)
        return self._read(ref, adapter, checked_tokens(added_tokens_config, name))

    def take_over(self, ref: LoRARef, adapter: ReadAdapter) -> LoRAUpdateOutput:
        """Make an adapter that every rank has read one that requests may name, or say why not: on all ranks alike."""
        try:
            self.validate_new_adapter(adapter.config, ref)
        except (ValueError, AssertionError) as error:
            return self.create_lora_update_result(success=False, error_message=str(error))
        self.configs[ref.lora_id] = adapter.config
        self.loras[ref.lora_id] = adapter.local
        self.lora_refs[ref.lora_id] = ref
        self.num_pinned_loras += int(bool(ref.pinned))
        logger.info(f"LoRA adapter loaded: {ref}, {format_bytes(adapter.local.num_bytes)} on this rank")
        return self.create_lora_update_result(success=True)

    def _read(self, ref: LoRARef, adapter: Adapter, added_tokens: Mapping[str, int] | None) -> ReadAdapter:
        config = self._sglang_config(adapter, added_tokens)
        limit = getattr(self, "max_lora_rank", None)
        if limit is not None and self._rank_is_given and adapter.max_rank > limit:
            raise BDLoRAError(
                f"{adapter.config.source}: rank: found {adapter.max_rank}, expected at most --max-lora-rank = {limit}"
            )
        plan = plan_adapter(ref.lora_name, adapter, self.served, self.sharding, self.dtype)
        unused = {**plan.unused, **check_saved_weights(adapter, self.base_model, self.served)}
        skip_or_refuse(unused, adapter.checkpoint.source, self.lora_strict_loading, get_parallel().tp_rank == 0)
        pool = getattr(self, "memory_pool", None)
        if pool is None:
            # The pool is made to measure for the first adapters: `init_memory_pool` stages them.
            return ReadAdapter(config, read_adapter(plan, adapter, self._unstaged_block))
        pool.check_fits(plan)
        local = read_adapter(plan, adapter, pool.slots.host_block)
        pool.slots.describe(local.packed)
        return ReadAdapter(config, local)

    def _unstaged_block(self, elements: int) -> HostBlock:
        return HostBlock.allocate(elements, 0, self.dtype, pin_memory=False)

    def _sglang_config(self, adapter: Adapter, added_tokens: Mapping[str, int] | None) -> LoRAConfig:
        fields = {**adapter.config.raw, "target_modules": adapter.config.target_modules}
        return LoRAConfig.from_dict(fields, added_tokens, base_vocab_size=self.base_hf_config.vocab_size)

    # --- start -----------------------------------------------------------------------------------------------

    def init_state(
        self,
        max_lora_rank: int | None = None,
        target_modules: Iterable[str] | None = None,
        lora_paths: list[LoRARef] | None = None,
    ) -> None:
        self.kernels = choose_kernels(
            self.device,
            self.max_loras_per_batch,
            exchanges=self.sharding.exchanges,
            deterministic=get_exec().deterministic.enable_deterministic_inference,
        )
        self.lora_backend.use(self.sharding, self.kernels)
        # Known before the first adapter is loaded, so that each is held to the limit.
        self.max_lora_rank = max_lora_rank
        self._rank_is_given = max_lora_rank is not None
        super().init_state(max_lora_rank, target_modules, lora_paths)

    def init_lora_shapes(self, max_lora_rank: int | None = None, target_modules: Iterable[str] | None = None) -> None:
        """Work out the target modules (SGLang's layer names) and the largest rank where they were not given."""
        adapted = {layer_kind(name) for lora in self.loras.values() for name in lora.plan.targets}
        if target_modules is None:
            self.target_modules = adapted
        elif set(target_modules) == {"all"}:
            self.target_modules = {layer_kind(name) for name in self.served.layers}
        else:
            # SGLang's names of projections stand for those of experts, too.
            kinds = get_normalized_target_modules(target_modules)
            self.target_modules = kinds | {f"experts.{kind}" for kind in kinds}
            self._check_target_modules(kinds, adapted)
        self.max_lora_rank = max_lora_rank or max((lora.plan.rank for lora in self.loras.values()), default=0)
        self.lora_added_tokens_size = 0

    def _check_target_modules(self, given: set[str], adapted: set[str]) -> None:
        served = {layer_kind(name) for name in self.served.layers}
        found = f"--lora-target-modules: found {', '.join(sorted(given))}"
        if not self.target_modules & served:
            raise BDLoRAError(f"{found}, expected some of {', '.join(sorted(served))}, or all")
        if unknown := given - {kind.removeprefix("experts.") for kind in served}:
            logger.warning("--lora-target-modules: no layer is served for %s", ", ".join(sorted(unknown)))
        if missing := adapted - self.target_modules:
            raise BDLoRAError(f"{found}, expected also {', '.join(sorted(missing))}, which the given adapters target")

    def _detect_shared_outer_loras(self) -> bool:
        return False  # a format of MoE experts that PEFT does not have

    def init_lora_modules(self) -> None:
        """Wrap the layers that adapters may target here; all others stay as they are."""
        self.embed_tokens_module = self.lm_head_module = None
        # SGLang's lists are by the number of a layer. Nobody asks for one by its number here.
        self.lora_modules: list[dict[str, Any]] = [{}]
        for name in sorted(self.served.layers):
            if layer_kind(name) not in self.target_modules:
                continue
            module = self.served.experts.get(name, name)
            layer = self.base_model.get_submodule(module)
            if not isinstance(layer, BaseLayerWithLoRA):
                layer = replace_submodule(self.base_model, module, wrap_layer(module, layer, self.lora_backend))
            self.lora_modules[0][name] = layer.projection(name) if name in self.served.experts else layer

    def init_memory_pool(self) -> None:
        self.memory_pool = BDLoRAMemoryPool(
            slot_sizes=self._slot_sizes(),
            sharding=self.sharding,
            kernels=self.kernels,
            base_hf_config=self.base_hf_config,
            max_loras_per_batch=self.max_loras_per_batch,
            dtype=self.dtype,
            max_lora_rank=self.max_lora_rank,
            target_modules=self.target_modules,
            base_model=self.base_model,
            eviction_policy=self.eviction_policy,
            lora_added_tokens_size=self.lora_added_tokens_size,
            enable_lora_overlap_loading=self.enable_lora_overlap_loading,
        )
        for lora_id, lora in self.loras.items():
            self.memory_pool.check_fits(lora.plan)
            self.loras[lora_id] = replace(lora, packed=self.memory_pool.stage(lora.packed))
        # Now, because SGLang sizes the KV cache next, by the memory that is left.
        self.scratch_bytes = self.kernels.reserve(
            {name: self.sharding.shape(name, layer) for name, layer in self._base_layers().items()}, batch_limits()
        )

    def _slot_sizes(self) -> dict[str, SlotSize]:
        """By the limit on the local rank where there is one, else just large enough for the adapters given at start.

        The kernels are those for the adapters given at start in either case.
        """
        layers = self._base_layers()
        own = slot_sizes_for_adapters(layers, [lora.plan for lora in self.loras.values()])
        # Shards can be uneven; the same slots on every rank make an adapter that fits on one fit on all.
        sizes: list[dict[str, SlotSize]] = get_parallel().tp_group.all_gather_object(own)
        given = {name: SlotSize.largest(rank_sizes[name] for rank_sizes in sizes) for name in own}
        limit = self.options.max_local_rank or (self.max_lora_rank if self._rank_is_given else None)
        if limit is None:
            return given
        return {
            name: self.sharding.slot_size(name, layer, limit).made_for(given[name]) for name, layer in layers.items()
        }

    def used_part_of_slot(self) -> float:
        """Elements of a slot just large enough for the adapters that are loaded, of those that a slot has."""
        sizes = slot_sizes_for_adapters(self._base_layers(), [lora.plan for lora in self.loras.values()])
        return sum(size.a + size.b for size in sizes.values()) / max(1, self.memory_pool.slot_elements)

    def _base_layers(self) -> dict[str, torch.nn.Module | ExpertProjection]:
        return {name: module.base_layer for by_name in self.lora_modules for name, module in by_name.items()}

    def update_lora_info(self) -> None:
        """Give layers their factors. Those that no adapter can touch get none, and SGLang runs the base layer alone."""
        for by_name in self.lora_modules:
            for name, module in by_name.items():
                if name in self.memory_pool.slots.layers:
                    module.set_lora_info(self.memory_pool.slots.layers[name])

    # --- batches ---------------------------------------------------------------------------------------------

    def validate_lora_batch(self, lora_ids: Set[str | None]) -> bool:
        return super().validate_lora_batch(lora_ids - {None})

    def fetch_new_loras(self, new_loras: Set[str | None], running_loras: Set[str | None] = frozenset()) -> None:
        """As SGLang's, without a slot for the base model."""
        super().fetch_new_loras(new_loras - {None}, running_loras - {None})

    def prepare_lora_batch(self, forward_batch: ForwardBatch) -> None:
        slots = [
            NO_SLOT if lora_id is None else self.memory_pool.get_buffer_id(lora_id)
            for lora_id in forward_batch.lora_ids
        ]
        # Rows behind those of the requests are beams', of the base model: SGLang has no beam search with LoRA.
        slots += [NO_SLOT] * (forward_batch.batch_size - len(slots))
        # As SGLang's own: captured graphs read metadata of their own, which is filled anew before each replay.
        graph = None
        if self._use_cuda_graph_batch(forward_batch):
            graph = "decode"
        elif self.can_use_prefill_cuda_graph(forward_batch):
            graph = "prefill"
        self.lora_backend.prepare(forward_batch, slots, graph)
        self.memory_pool.guard.read_by_next_forward(slot for slot in slots if slot != NO_SLOT)


def _read_added_tokens(folder: Path) -> Mapping[str, int] | None:
    """Tokens that the adapter adds to the vocabulary; SGLang refuses those that the base model does not have."""
    path = folder / "added_tokens.json"
    return checked_tokens(read_json(path, "added tokens"), str(path)) if path.is_file() else None
