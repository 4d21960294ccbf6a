"""The LoRA backend: which tokens belong to which slot, and the one call that computes a layer with its delta."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from sglang.srt.lora.backend.base_backend import BaseLoRABackend
from sglang.srt.lora.backend.lora_registry import register_lora_backend
from sglang.srt.lora.utils import generate_sequence_lengths, get_lm_head_pruned_lens
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

from bdlora_kernels import LayerFactors
from bdlora_sglang.serving.head_rows import HeadRows
from bdlora_sglang.serving.kernels import NO_SLOT, Kernels
from bdlora_sglang.serving.layers import ColumnParallelLinearWithBDLoRA, RowParallelLinearWithBDLoRA
from bdlora_sglang.serving.sharding import Sharding

BACKEND_NAME = "bdlora"


@dataclass(frozen=True)
class BatchInfo:
    """What SGLang's layers and ours ask of a batch; ``segments`` are those of the kernels in use.

    None where nobody reads them: SGLang runs the layers without LoRA. ``head_rows`` are the output head's,
    ``slot_T`` the slot of each token for experts.
    """

    has_active_lora: bool
    segments: Any
    head_rows: HeadRows = field(default_factory=HeadRows)
    slot_T: np.ndarray[Any, np.dtype[np.int64]] = field(default_factory=lambda: np.zeros(0, np.int64))


class BDLoRABackend(BaseLoRABackend):
    """Adds every delta to the layer's partial output, before the layer's own all-reduce.

    One path for eager and captured forwards: a captured graph reads segments at fixed addresses, which `prepare` fills.
    """

    name = BACKEND_NAME
    # Batches for the base model alone take SGLang's path without LoRA, and graphs that were captured without it.
    skip_inactive_dense_lora = True
    supports_prefill_cuda_graph = True

    def __init__(self, max_loras_per_batch: int, device: torch.device, **_: object) -> None:
        super().__init__(max_loras_per_batch, device)

    def use(self, sharding: Sharding, kernels: Kernels) -> None:
        """Say how deltas are computed; the manager does, before it loads any adapter."""
        self.sharding, self.kernels = sharding, kernels

    def prepare(self, forward_batch: ForwardBatch, slots: Sequence[int], graph: str | None) -> None:
        """Take over a batch.

        Args:
            forward_batch: SGLang's.
            slots: the pool slot of each request, `NO_SLOT` for the base model.
            graph: "decode" or "prefill" where such a captured graph will run, else None.
        """
        if any(slot != NO_SLOT for slot in slots):
            lengths = _lengths(forward_batch)
            segments = self.kernels.segments(slots, lengths, graph)
            head_rows = HeadRows(tuple(slots), get_lm_head_pruned_lens(forward_batch))
            self.batch_info = BatchInfo(True, segments, head_rows, np.repeat(slots, lengths))
        else:
            # A captured graph may run the kernels all the same: no token is theirs then.
            self.batch_info = BatchInfo(False, None if graph is None else self.kernels.segments((), (), graph))

    def forward_with_base(
        self,
        layer: ColumnParallelLinearWithBDLoRA | RowParallelLinearWithBDLoRA,
        x: torch.Tensor,
        base_fn: Callable[[], torch.Tensor],
        *_buffers: object,
        all_reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
        **_options: object,
    ) -> torch.Tensor:
        """Base output plus delta, reduced once where the layer reduces (SGLang: ``BaseLoRABackend``)."""
        assert self.batch_info is not None and self.batch_info.segments is not None, "layers ask `lora_active` first"
        output = self.sharding.forward_with_base(
            layer.base_layer, base_fn, x, layer.factors, self.kernels, self.batch_info.segments
        )
        return output if all_reduce is None else all_reduce(output)

    def add_embedding_delta(
        self, layer: VocabParallelEmbedding, y_TO: torch.Tensor, ids_T: torch.Tensor, factors: LayerFactors
    ) -> None:
        """Add the delta of the tokens that are this rank's to the embedding's partial output, in place."""
        assert self.batch_info is not None, "layers ask `lora_active` first"
        first = layer.shard_indices.org_vocab_start_index
        self.kernels.add_embedding_delta(y_TO, ids_T, first, factors, self.batch_info.segments)

    def head_with_delta(
        self,
        layer: VocabParallelEmbedding,
        base: Callable[[], torch.Tensor],
        x_TI: torch.Tensor,
        factors: LayerFactors,
        head_pass: int | None,
    ) -> torch.Tensor:
        """``base()``, this rank's logits of the rows ``x_TI``, with their delta."""
        assert self.batch_info is not None, "layers ask `lora_active` first"
        slots, lengths = self.batch_info.head_rows.of(x_TI.shape[0], head_pass)
        segments = self.batch_info.segments if lengths is None else self.kernels.segments(slots, lengths, graph=None)
        return self.kernels.forward_with_base(base, layer.num_embeddings_per_partition, x_TI, factors, segments)

    def init_decode_cuda_graph_batch_info(self, max_bs_in_cuda_graph: int, num_tokens_per_req: int) -> None:
        self.kernels.reserve_decode_graphs(max_bs_in_cuda_graph * num_tokens_per_req)

    def init_prefill_cuda_graph_batch_info(self, max_num_tokens: int, max_num_requests: int | None = None) -> None:
        self.kernels.reserve_prefill_graphs(max_num_tokens)
        self.prefill_cuda_graph_max_bs = max_num_tokens if max_num_requests is None else max_num_requests
        self.prefill_cuda_graph_max_tokens = max_num_tokens


def _lengths(forward_batch: ForwardBatch) -> list[int]:
    """Tokens of each request."""
    if forward_batch.forward_mode.is_decode():
        return [1] * forward_batch.batch_size
    return generate_sequence_lengths(forward_batch, device=torch.device("cpu")).tolist()


@register_lora_backend(BACKEND_NAME)
def _backend() -> type[BDLoRABackend]:
    return BDLoRABackend
