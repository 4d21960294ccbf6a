"""LoRA on SGLang's embeddings and output heads, which a rank holds for its part of the vocabulary.

An output head is column-parallel, with the vocabulary as its outputs. An embedding is row-parallel, with the vocabulary
as its inputs: a rank looks up A for the tokens that are its own, and the delta rides in the embedding's own all-reduce.
"""

import torch
from sglang.srt.distributed import tensor_model_parallel_all_reduce
from sglang.srt.layers.dp_attention import attn_tp_all_reduce
from sglang.srt.layers.layer_boundary import get_attn_tp_context
from sglang.srt.layers.logits_processor import should_apply_lm_head_quant_method
from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod
from sglang.srt.lora.backend.base_backend import BaseLoRABackend
from sglang.srt.lora.layers import BaseLayerWithLoRA
from sglang.srt.runtime_context import get_exec
from torch.nn.functional import linear

from bdlora_kernels import LayerFactors


class _VocabularyLayer(BaseLayerWithLoRA):
    factors: LayerFactors

    def set_lora_info(self, factors: LayerFactors) -> None:
        self.factors = factors
        self.set_lora = True


class EmbeddingWithBDLoRA(_VocabularyLayer):
    """SGLang's ``VocabParallelEmbedding`` with LoRA.

    It has no ``apply_lora``, by which SGLang knows output heads with LoRA: models with tied weights may hand it over as
    their head, and LoRA on the embedding is none on the head (as for PEFT).
    """

    def forward(self, input_: torch.Tensor) -> torch.Tensor:
        """``(T, hidden)``, summed over the ranks as the base layer does."""
        layer = self.base_layer
        if not self.lora_active:
            return layer.forward(input_)
        # What `VocabParallelEmbedding.forward` does, with the delta before the sum.
        output = layer._embed_local_shard(input_)
        self.lora_backend.add_embedding_delta(layer, output, input_, self.factors)
        if output.numel() == 0 or layer.tp_size == 1 or get_attn_tp_context().input_scattered:
            return output
        reduce = attn_tp_all_reduce if layer.use_attn_tp_group else tensor_model_parallel_all_reduce
        return reduce(output)


class LMHeadWithBDLoRA(_VocabularyLayer):
    """An output head with LoRA, tied to the embedding or not; SGLang's ``LogitsProcessor`` calls it."""

    def __init__(self, base_layer: torch.nn.Module, lora_backend: BaseLoRABackend) -> None:
        super().__init__(base_layer, lora_backend)
        self._pass: int | None = None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``(rows, vocabulary of this rank)``; the rows are those of the batch that logits are wanted for."""
        if not self.lora_active:
            return self._logits(hidden_states)
        return self.lora_backend.head_with_delta(
            self.base_layer, lambda: self._logits(hidden_states), hidden_states, self.factors, self._pass
        )

    def _logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # As `LogitsProcessor._compute_lm_head` does without LoRA.
        head, method = self.base_layer, self.base_layer.quant_method
        bias = getattr(head, "bias", None)
        if should_apply_lm_head_quant_method(head, method):
            return method.apply(head, hidden_states, bias)
        weight = head.weight
        if get_exec().features.enable_fp32_lm_head and isinstance(method, UnquantizedEmbeddingMethod):
            return linear(hidden_states.float(), weight.float(), None if bias is None else bias.float())
        return linear(hidden_states.to(weight.dtype), weight, bias)

    def apply_lora(self, base_output: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """What tells SGLang to call the head instead of reading its weight; nothing calls it."""
        raise NotImplementedError

    def set_lm_head_pass(self, pass_idx: int) -> None:
        """SGLang hands over the rows in passes of ``SGLANG_LOGPROB_CHUNK_SIZE``; this is the next."""
        self._pass = pass_idx

    def reset_lm_head_pass(self) -> None:
        """From here on all rows at once again."""
        self._pass = None
