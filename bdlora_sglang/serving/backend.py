"""The LoRA backend: which tokens belong to which slot, and the one call into the kernels."""

from collections.abc import Callable, Sequence

import torch
from sglang.srt.lora.backend.base_backend import BaseLoRABackend
from sglang.srt.lora.backend.lora_registry import register_lora_backend
from sglang.srt.lora.utils import generate_sequence_lengths
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

from bdlora_kernels import add_lora_delta, group_tokens
from bdlora_sglang.errors import BDLoRAError
from bdlora_sglang.serving.layers import ColumnParallelLinearWithBDLoRA, RowParallelLinearWithBDLoRA

BACKEND_NAME = "bdlora"
NO_SLOT = -1  # the base model: its tokens cost nothing


class BDLoRABackend(BaseLoRABackend):
    """Adds every delta to the layer's partial output, before the layer's own all-reduce: no other communication."""

    name = BACKEND_NAME

    def __init__(self, max_loras_per_batch: int, device: torch.device, **_: object) -> None:
        super().__init__(max_loras_per_batch, device)

    def prepare(self, forward_batch: ForwardBatch, slots: Sequence[int]) -> None:
        """Take over a batch; ``slots`` has the pool slot of each request, `NO_SLOT` for the base model."""
        lengths = generate_sequence_lengths(forward_batch, device=torch.device("cpu")).tolist()
        # None makes the layers take SGLang's path without LoRA.
        self.batch_info = group_tokens(slots, lengths, self.device) or None

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
        output = base_fn()
        assert self.batch_info is not None, "the layers ask `lora_active` first"
        add_lora_delta(output, x, layer.factors, self.batch_info)
        return output if all_reduce is None else all_reduce(output)

    def init_decode_cuda_graph_batch_info(self, max_bs_in_cuda_graph: int, num_tokens_per_req: int) -> None:
        raise BDLoRAError(
            "--cuda-graph-backend-decode: found CUDA graphs enabled, expected 'disabled': they are not supported yet"
        )


@register_lora_backend(BACKEND_NAME)
def _backend() -> type[BDLoRABackend]:
    return BDLoRABackend
