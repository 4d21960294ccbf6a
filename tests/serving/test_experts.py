"""LoRA on the experts of MoE layers, against PEFT's own forward."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bdlora_perf.synthetic.reference import PeftReference
from tests.serving.test_families import Case, Family, engine_of
from tests.serving.test_served_modules import _tree
from tests.serving.zoo import Zoo

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
