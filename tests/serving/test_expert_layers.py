"""One layer of SGLang's experts with LoRA, for every rank: also as gpt-oss has them, which SGLang starts on no CPU."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bdlora_kernels import EagerSlots
from bdlora_sglang.adapter import Adapter
from bdlora_sglang.errors import AdapterError, BDLoRAError
from tests.adapter.test_parameters import EXPERTS, HIDDEN, INTERMEDIATE, saved
from tests.serving.test_layers import as_rank
from tests.serving.test_proof import Alone
from tests.serving.test_served_modules import _tree

__all__ = ["as_rank"]

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
SWIGLU = {"gemm1_alpha": 1.702, "gemm1_clamp_limit": 7.0, "with_bias": True}  # gpt-oss
TOKENS, TOP_K = 9, 2
ZEROS = {
    "gate_up_proj": torch.zeros(EXPERTS, 2 * INTERMEDIATE, HIDDEN),
    "down_proj": torch.zeros(EXPERTS, HIDDEN, INTERMEDIATE),
}


def _layer(weights: dict[str, torch.Tensor], rank: int, tp: int, options: dict[str, Any]) -> Any:
    """SGLang's layer with this rank's part of ``weights``, which are laid out as transformers has them."""
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    layer = FusedMoE(
        EXPERTS, HIDDEN, INTERMEDIATE, layer_id=0, top_k=TOP_K, params_dtype=torch.float32, inplace=False, **options
    )
    own = slice(rank * INTERMEDIATE // tp, (rank + 1) * INTERMEDIATE // tp)
    is_interleaved = "gemm1_alpha" in options
    for name, of in {"w13_weight": "gate_up_proj", "w13_weight_bias": "gate_up_proj_bias"}.items():
        if of in weights:
            halves = weights[of].unflatten(1, (-1, 2) if is_interleaved else (2, -1))
            part = halves[:, own] if is_interleaved else halves[:, :, own]
            getattr(layer, name).data.copy_(part.flatten(1, 2))
    layer.w2_weight.data.copy_(weights["down_proj"][:, :, own])
    if "down_proj_bias" in weights:
        layer.w2_weight_bias.data.copy_(weights["down_proj_bias"] if rank == 0 else torch.zeros(EXPERTS, HIDDEN))
    return layer


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("options", [{}, SWIGLU, {"activation": "gelu"}], ids=["silu", "gpt-oss", "gelu"])
def test_a_layer_is_the_merged_one(as_rank: Any, tmp_path: Path, options: dict[str, Any], tp: int) -> None:
    """The ranks' outputs add up to that of SGLang's own layer with the adapter merged by PEFT, token by token."""
    from sglang.srt.layers.moe.fused_moe_native import moe_forward_native
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    is_gpt_oss = options is SWIGLU
    deltas = saved(tmp_path, is_transposed=is_gpt_oss, target_parameters=BOTH, target_modules=[])
    deltas = {name.rpartition(".")[2]: delta for name, delta in deltas.items() if name.startswith("layers.0.")}
    deltas = {name: delta.mT if is_gpt_oss else delta for name, delta in deltas.items()}
    generator = torch.Generator().manual_seed(3)
    weights = {name: torch.randn(delta.shape, generator=generator) for name, delta in deltas.items()}
    if is_gpt_oss:
        weights["gate_up_proj_bias"] = torch.randn(EXPERTS, 2 * INTERMEDIATE, generator=generator)
        weights["down_proj_bias"] = torch.randn(EXPERTS, HIDDEN, generator=generator)
    x_TH = torch.randn(TOKENS, HIDDEN, generator=generator)
    logits = torch.randn(TOKENS, EXPERTS, generator=generator)
    scores, ids = logits.softmax(dim=1).topk(TOP_K)
    routed = StandardTopKOutput(scores, ids.int(), logits)
    slots = [0, -1, 1, -1, 0, 0, 0, 0, 0]  # slot 1 is empty
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        total = torch.zeros(TOKENS, HIDDEN)
        for rank in range(tp):
            as_rank(rank, tp)
            total += _with_lora(_layer(weights, rank, tp, options), tmp_path, slots)(x_TH, routed)
        as_rank(0, 1)
        merged = {name: weight + deltas.get(name, 0) for name, weight in weights.items()}
        layers = (_layer(own, 0, 1, options) for own in (weights, merged))
        base, with_lora = (moe_forward_native(layer, x_TH, routed, layer.moe_runner_config) for layer in layers)
    expected = torch.where(torch.tensor(slots)[:, None] == 0, with_lora, base)
    torch.testing.assert_close(total, expected, atol=2e-4, rtol=1e-4)
    assert (with_lora - base).abs().max() > 0.1


def _manager(layer: Any) -> SimpleNamespace:
    """What the proof asks of a manager, with two slots of rank 4 for the layer's experts."""
    from bdlora_sglang.serving.backend import BDLoRABackend
    from bdlora_sglang.serving.communication_free import CommunicationFree
    from bdlora_sglang.serving.kernels import TorchKernels
    from bdlora_sglang.serving.layers import wrap_layer
    from bdlora_sglang.serving.served_modules import served_modules

    cpu, sharding = torch.device("cpu"), CommunicationFree()
    served = served_modules(_tree({"layers.0.experts": layer}), object())
    backend, kernels = BDLoRABackend(2, cpu), TorchKernels(cpu)
    backend.use(sharding, kernels)
    wrapped = wrap_layer("layers.0.experts", layer, backend)
    projections = {name: wrapped.projection(name) for name in sorted(served.layers)}
    sizes = {name: sharding.slot_size(name, projection.base_layer, 4) for name, projection in projections.items()}
    slots = EagerSlots(2, sizes, torch.float32, cpu, pin_memory=False)
    for name, projection in projections.items():
        projection.set_lora_info(slots.layers[name])
    return SimpleNamespace(
        memory_pool=SimpleNamespace(slots=slots, check_fits=lambda plan: None),
        lora_modules=[projections],
        served=served,
        sharding=sharding,
        kernels=kernels,
        lora_backend=backend,
        dtype=torch.float32,
        device=cpu,
        wrapped=wrapped,
    )


def _with_lora(layer: Any, folder: Path, slots: list[int]) -> Any:
    """The layer, wrapped, with the adapter in slot 0 and a batch of one token a slot."""
    import numpy as np

    from bdlora_sglang.serving.backend import BatchInfo
    from bdlora_sglang.serving.head_rows import HeadRows
    from bdlora_sglang.serving.local_adapter import plan_adapter, read_adapter

    manager = _manager(layer)
    adapter = Adapter.open(folder)
    first = {name: module for name, module in adapter.modules.items() if name.startswith("layers.0.")}
    adapter = Adapter(adapter.config, first, adapter.checkpoint)
    plan = plan_adapter("test", adapter, manager.served, manager.sharding, torch.float32)
    pool = manager.memory_pool.slots
    pool.write(0, read_adapter(plan, adapter, pool.host_block).packed)
    segments = manager.kernels.segments(slots, [1] * len(slots), None)
    manager.lora_backend.batch_info = BatchInfo(True, segments, HeadRows(), np.array(slots))
    return manager.wrapped


def test_experts_are_proven(as_rank: Any) -> None:
    from bdlora_sglang.serving.proof import prove_deltas

    as_rank(0, 1)
    manager = _manager(_layer(ZEROS, 0, 1, {}))
    first = ["layers.0.experts.0.down_proj", "layers.0.experts.0.gate_up_proj"]
    assert prove_deltas(manager, Alone()) == first
    manager.lora_modules[0][first[1]].factors = None
    with pytest.raises(BDLoRAError, match=r"not in place: layer 'layers\.0\.experts\.0\.gate_up_proj'"):
        prove_deltas(manager, Alone())


def test_experts_that_are_not_served_are_refused_by_name(as_rank: Any, tmp_path: Path) -> None:
    from bdlora_sglang.serving.find_modules import find_modules
    from bdlora_sglang.serving.kernels import TorchKernels
    from bdlora_sglang.serving.served_modules import served_modules

    as_rank(0, 1)
    saved(tmp_path, target_parameters=BOTH, target_modules=[])
    adapter = Adapter.open(tmp_path)
    tree = _tree({"layers.0.experts": _layer(ZEROS, 0, 1, {})})
    served = served_modules(tree, object(), no_experts=TorchKernels(torch.device("meta")).no_experts)
    with pytest.raises(AdapterError, match=r"layers\.0\.experts\.0\.down_proj'.*served on a CPU alone"):
        find_modules(adapter, served)
