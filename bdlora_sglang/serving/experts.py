"""LoRA on the experts of an MoE layer: w13 of each is a column-parallel layer of its own, w2 a row-parallel one.

The delta of w13 is added before the activation, that of w2 before the experts' outputs are weighted and added up. w2's
rides in the all-reduce that follows the layer, so that ranks exchange nothing for LoRA.

Shape suffixes: T tokens, K experts of a token, P pairs of a token and an expert, H hidden features, I and O inputs
and outputs of a product.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from sglang.srt.distributed import tensor_model_parallel_all_reduce
from sglang.srt.layers.activation import GeluAndMul, SiluAndMul
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe import swiglu_gpt_oss_sigmoid_alpha
from sglang.srt.layers.moe.topk import TopKOutput, TopKOutputChecker
from sglang.srt.lora.backend.base_backend import BaseLoRABackend
from sglang.srt.lora.layers import BaseLayerWithLoRA
from torch.nn.functional import linear

from bdlora_kernels import LayerFactors
from bdlora_sglang.serving.kernels import LayerShape
from bdlora_sglang.serving.module_parts import has_interleaved_experts
from bdlora_sglang.serving.sharding import ExpertProjection

Slots = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(eq=False)
class ProjectionWithBDLoRA:
    """One product of one expert with LoRA, for the manager and the pool a layer like any other."""

    base_layer: ExpertProjection
    of: "ExpertsWithBDLoRA"
    weight: str
    expert: int
    factors: LayerFactors | None = None

    def set_lora_info(self, factors: LayerFactors) -> None:
        self.factors = factors
        self.of.set_lora = True

    def __call__(self, x_PI: torch.Tensor, slot_P: Slots) -> torch.Tensor:
        """``(P, O)``, this rank's part, with the delta of each row's slot."""
        if self.factors is None:
            return self._product(x_PI)
        kernels = self.of.lora_backend.kernels
        segments = kernels.segments(slot_P.tolist(), [1] * len(slot_P), graph=None)
        outputs = self.base_layer.shape.outputs
        return kernels.forward_with_base(lambda: self._product(x_PI), outputs, x_PI, self.factors, segments)

    def _product(self, x_PI: torch.Tensor) -> torch.Tensor:
        # As SGLang's ``moe_forward_native``.
        layer = self.of.base_layer
        y_PO = linear(x_PI, getattr(layer, self.weight)[self.expert])
        bias = getattr(layer, f"{self.weight}_bias", None)
        return y_PO if bias is None else (y_PO.float() + bias[self.expert]).to(y_PO.dtype)


class ExpertsWithBDLoRA(BaseLayerWithLoRA):
    """SGLang's ``FusedMoE`` with LoRA. Batches without an adapter are the base layer's own."""

    base_layer: FusedMoE

    def __init__(self, base_layer: FusedMoE, lora_backend: BaseLoRABackend) -> None:
        super().__init__(base_layer, lora_backend)
        hidden, intermediate = base_layer.hidden_size, base_layer.intermediate_size_per_partition
        w13 = ExpertProjection(LayerShape(hidden, 2 * intermediate), 1 if has_interleaved_experts(base_layer) else 2)
        w2 = ExpertProjection(LayerShape(intermediate, hidden), 1)
        experts = range(base_layer.num_experts)
        self.gate_up_proj = [ProjectionWithBDLoRA(w13, self, "w13_weight", expert) for expert in experts]
        self.down_proj = [ProjectionWithBDLoRA(w2, self, "w2_weight", expert) for expert in experts]
        self._activation = _activation(base_layer)
        # Under the names by which models load weights into them, as `BaseLayerWithLoRA` has a linear layer's.
        self._parameters.update(base_layer._parameters)

    def __getattr__(self, name: str) -> Any:
        """Models read how their experts are set up."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def projection(self, layer: str) -> ProjectionWithBDLoRA:
        """By the name of its layer, ``...experts.3.down_proj``."""
        _, expert, name = layer.rsplit(".", 2)
        return {"gate_up_proj": self.gate_up_proj, "down_proj": self.down_proj}[name][int(expert)]

    def forward(self, hidden_states: torch.Tensor, topk_output: TopKOutput, **options: Any) -> torch.Tensor:
        """``(T, H)``, this rank's part, unless the layer itself reduces."""
        layer = self.base_layer
        if not self.lora_active:
            return layer.forward(hidden_states, topk_output, **options)
        assert TopKOutputChecker.format_is_standard(topk_output), "on a CPU, SGLang routes by itself"
        output = self._weighted_sum(hidden_states, topk_output.topk_weights, topk_output.topk_ids)
        return tensor_model_parallel_all_reduce(output) if layer.reduce_results and layer.moe_tp_size > 1 else output

    def _weighted_sum(self, x_TH: torch.Tensor, weights_TK: torch.Tensor, experts_TK: torch.Tensor) -> torch.Tensor:
        """As ``moe_forward_native``, with deltas."""
        tokens, choices = experts_TK.shape
        slot_P = np.repeat(self.lora_backend.batch_info.slot_T, choices)
        expert_P = experts_TK.flatten().cpu().numpy()
        assert len(slot_P) == len(expert_P), "a token of the batch for each row"
        # Pairs of an expert lie side by side, and among them those of an adapter.
        order = np.lexsort((slot_P, expert_P))
        expert_P, slot_P, order_P = expert_P[order], slot_P[order], torch.from_numpy(order)
        x_PH = x_TH[order_P // choices]
        y_PH = torch.empty_like(x_PH)
        experts, starts = np.unique(expert_P, return_index=True)
        for expert, start, stop in zip(experts, starts, [*starts[1:], len(order)], strict=True):
            x_PI = self._activation(self.gate_up_proj[expert](x_PH[start:stop], slot_P[start:stop]))
            y_PH[order_P[start:stop]] = self.down_proj[expert](x_PI, slot_P[start:stop])
        y_TKH = y_PH.view(tokens, choices, -1).to(weights_TK.dtype)
        return (y_TKH * weights_TK[..., None]).sum(dim=1).to(x_TH.dtype)


def _activation(layer: FusedMoE) -> Callable[[torch.Tensor], torch.Tensor]:
    """From outputs of gate and up to what w2 reads."""
    config = layer.moe_runner_config
    if has_interleaved_experts(layer):
        return partial(
            swiglu_gpt_oss_sigmoid_alpha, gemm1_alpha=config.gemm1_alpha, gemm1_limit=config.gemm1_clamp_limit
        )
    return {"silu": SiluAndMul, "gelu": GeluAndMul}[config.activation]()
