"""LoRA on the experts of MoE layers, against PEFT's own forward."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from bdlora_kernels import EagerSlots
from bdlora_perf.synthetic.reference import PeftReference
from bdlora_sglang.adapter import Adapter
from bdlora_sglang.errors import AdapterError, BDLoRAError
from tests.adapter.test_parameters import EXPERTS, HIDDEN, INTERMEDIATE, saved
from tests.serving.test_families import Case, Family, engine_of
from tests.serving.test_layers import as_rank
from tests.serving.test_proof import Alone
from tests.serving.test_served_modules import _tree
from tests.serving.zoo import Zoo

__all__ = ["as_rank"]

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
PROJECTIONS = ["gate_proj", "up_proj", "down_proj"]
# What transformers 5 and PEFT make of experts: LoRA on parameters.
ADAPTERS: dict[str, dict[str, Any]] = {
    "parameters": {"rank": 4, "target_modules": ["q_proj"], "target_parameters": BOTH},
    "down-layer1": {
        "rank": 3,
        "target_modules": [],
        "target_parameters": ["layers.1.mlp.experts.down_proj"],
        "use_rslora": True,
    },
    "gate-up": {"rank": 5, "target_modules": [], "target_parameters": ["gate_up_proj"]},
    # PEFT makes parameters of them: gate_up_proj of twice the rank.
    "names-of-modules": {"rank": 4, "target_modules": ["v_proj", *PROJECTIONS]},
    "all-linear": {"rank": 4, "target_modules": "all-linear"},  # the router, too
    "attention": {"rank": 6, "target_modules": ["q_proj", "o_proj"]},
}
# What they made of them before: a linear module for each projection of each expert. PEFT converts the first when it
# loads it, and cannot load the others any more.
UNFUSED: dict[str, dict[str, Any]] = {
    "modules": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", *PROJECTIONS]},
    "bd2": {"r": 8, "lora_alpha": 8, "nblocks": 2, "target_modules": ["o_proj", *PROJECTIONS]},
    "bd4-rslora-layers": {
        "r": 8,
        "lora_alpha": 4,
        "nblocks": 4,
        "use_rslora": True,
        "target_modules": PROJECTIONS,
        "layers_to_transform": [0, 2],
    },
    "some-experts": {"r": 3, "lora_alpha": 6, "target_modules": r".*experts\.[13]\.(gate|down)_proj"},
}
W = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def _unfused(model: Any) -> nn.Module:
    """The linear modules of a model by themselves, and those that its experts were in older releases."""
    modules = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            for expert, (gate_up, down) in enumerate(zip(module.gate_up_proj, module.down_proj, strict=True)):
                for projection, weight in zip(PROJECTIONS, (*gate_up.chunk(2), down), strict=True):
                    linear = nn.Linear(*reversed(weight.shape), bias=False)
                    linear.weight.data = weight.detach().clone()
                    modules[_unfused_name(model, name, expert, projection)] = linear
    return _tree(modules)


def _unfused_name(model: Any, experts: str, expert: int, projection: str) -> str:
    if model.config.model_type == "mixtral":
        experts, projection = experts.replace(".mlp.", ".block_sparse_moe."), W[projection]
    return f"{experts}.{expert}.{projection}"


def _make_unfused(model_folder: Path, folder: Path, merged: Path, **fields: Any) -> None:
    """An adapter by PEFT on `_unfused` modules, and the model into whose weights PEFT merged it."""
    from peft import BdLoraConfig, LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(len(folder.name))
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    if model.config.model_type == "mixtral" and not isinstance(fields["target_modules"], str):
        fields["target_modules"] = [W.get(name, name) for name in fields["target_modules"]]
    if nblocks := fields.pop("nblocks", None):
        row_parallel = [name for name in ("o_proj", "down_proj", "w2") if name in fields["target_modules"]]
        column_parallel = [name for name in fields["target_modules"] if name not in row_parallel]
        fields["use_bdlora"] = BdLoraConfig(
            target_modules_bd_a=row_parallel or None, target_modules_bd_b=column_parallel or None, nblocks=nblocks
        )
    peft = get_peft_model(_unfused(model), LoraConfig(init_lora_weights=False, **fields))
    for module in peft.modules():
        if hasattr(module, "lora_A"):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            nn.init.normal_(a, std=a.shape[1] ** -0.5)
            nn.init.normal_(b, std=0.5 / module.scaling["default"] * b.shape[1] ** -0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.save_pretrained(str(folder))
    weights = {
        name: module.weight for name, module in peft.merge_and_unload().named_modules() if hasattr(module, "weight")
    }
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(weights[name])
            elif name.endswith(".experts"):
                for expert in range(len(module.down_proj)):
                    own = [weights[_unfused_name(model, name, expert, projection)] for projection in PROJECTIONS]
                    module.gate_up_proj[expert] = torch.cat(own[:2])
                    module.down_proj[expert] = own[2]
    model.save_pretrained(merged)


@dataclass
class ExpertCase(Case):
    references: dict[str, tuple[PeftReference, Path | None]] = field(default_factory=dict)

    def reference_of(self, name: str | None) -> tuple[PeftReference, Path | None]:
        return self.references.get(name or "", (self.reference, None))


# 80 intermediate features are padded at TP 2 and 4.
CASES = [
    pytest.param("qwen3_moe", 2, {"moe_intermediate_size": 80}, id="qwen3_moe-tp2"),
    pytest.param("qwen3_moe", 1, {}, id="qwen3_moe-tp1", marks=pytest.mark.full),
    pytest.param(
        "qwen3_moe", 4, {"num_attention_heads": 8, "num_key_value_heads": 2}, id="qwen3_moe-tp4", marks=pytest.mark.full
    ),
    pytest.param("mixtral", 1, {}, id="mixtral-tp1", marks=pytest.mark.full),
    pytest.param("mixtral", 2, {}, id="mixtral-tp2", marks=pytest.mark.full),
]


def _case(architecture: str, tp: int, shape: dict[str, Any], zoo: Zoo, root: Path) -> Iterator[ExpertCase]:
    model = zoo.model(architecture, **shape)
    # PEFT takes adapters with other parameters than those before only in another model.
    adapters = {
        name: zoo.adapter(model, f"experts-{name}", seed=80 + index, **spec)
        for index, (name, spec) in enumerate(ADAPTERS.items())
        if architecture != "mixtral" or name != "names-of-modules"
    }
    references = {name: (PeftReference(model), path) for name, path in adapters.items()}
    for name, fields in UNFUSED.items():
        if architecture == "mixtral" and isinstance(fields["target_modules"], str):
            continue
        adapters[name] = root / name
        _make_unfused(model, root / name, root / f"{name}-merged", **fields)
        references[name] = PeftReference(root / f"{name}-merged"), None
    with engine_of(model, adapters, tp) as engine:
        family = Family(architecture, tp, {})
        yield ExpertCase(family, engine, model, adapters, PeftReference(model), references)


@pytest.mark.parametrize(("architecture", "tp", "shape"), CASES)
def test_tokens_and_logprobs_equal_peft(
    architecture: str, tp: int, shape: dict[str, Any], zoo: Zoo, tmp_path: Path
) -> None:
    """One batch of all adapters and the base model; then some of them, and the rest, so that slots change hands."""
    for case in _case(architecture, tp, shape, zoo, tmp_path):
        case.assert_equals_peft([None, *case.adapters])
        if "modules" in case.adapters and architecture == "qwen3_moe":
            # The same by PEFT's own conversion to parameters.
            case.references["modules"] = PeftReference(case.model), case.adapters["modules"]
        case.assert_equals_peft(["modules", None, "attention"])


# --- One layer, and what no model that starts on a CPU has ---------------------------------------------------------

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
