"""What the config says of a module, against PEFT's own functions and layers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import BdLoraConfig, LoraConfig, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file
from torch import nn

from bdlora_sglang.adapter import Adapter, AdapterConfig, BlockSide

NAMES = [
    "q_proj",
    "layers.0.q_proj",
    "layers.1.self_attn.q_proj",
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.10.self_attn.q_proj",
    "model.layers.1.mlp.experts.0.q_proj",
    "model.layers.1.mlp.experts.1.up_proj",
    "model.encoder.layer.1.blocks.0.up_proj",
    "model.h.1.mlp.my_q_proj",
    "model.layers.1.self_attn.q_proj.inner",
    "lm_head",
]
TARGETS = ["q_proj", ["q_proj"], ["q_proj", "up_proj"], ["self_attn.q_proj"], ["proj"], r".*\.[01]\..*\.(q|up)_proj"]
LAYERS = [None, [], 0, 1, [1], [0, 10]]
LAYER_PATTERNS = [None, [], "layers", ["layers"], ["experts", "layers"], ["layers", "experts"], [r"(?:layer|blocks)"]]


def config(**fields: object) -> AdapterConfig:
    return AdapterConfig.from_dict({"peft_type": "LORA", "r": 8, "lora_alpha": 4, **fields}, "config")


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_targets(target: str | list[str]) -> None:
    for layers in LAYERS if isinstance(target, list) else [None]:
        for pattern in LAYER_PATTERNS if layers else [None]:
            fields: dict[str, Any] = {
                "target_modules": target,
                "layers_to_transform": layers,
                "layers_pattern": pattern,
            }
            ours, peft = config(**fields), LoraConfig(**fields)
            for name in NAMES:
                assert ours.adapts(name) == bool(check_target_module_exists(peft, name)), (name, fields)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(24, 48)
        self.o_proj = nn.Linear(48, 24)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block(), Block()])
        self.lm_head = nn.Linear(24, 48)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:Could not identify embedding layer")
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
@pytest.mark.parametrize("use_rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize(
    ("rank_pattern", "alpha_pattern"),
    [
        pytest.param({}, {}, id="none"),
        pytest.param({"q_proj": 12}, {"o_proj": 3}, id="by-module"),
        pytest.param({"layers.1.q_proj": 12, "q_proj": 4}, {"layers.1.q_proj": 3.5}, id="first-match-wins"),
        pytest.param({"q_proj": 4, "layers.1.q_proj": 12}, {}, id="shadowed"),
        pytest.param({r"layers\.[02]\..*": 16}, {r".*o_proj": 5, r"^layers.0.q_proj": 9}, id="regex"),
        pytest.param({"proj": 16}, {"j": 5}, id="not-a-whole-name"),
    ],
)
def test_rank_side_and_scaling(
    rank_pattern: dict[str, int], alpha_pattern: dict[str, float], use_rslora: bool, tmp_path: Path
) -> None:
    peft_config = LoraConfig(
        r=8,
        lora_alpha=20,
        target_modules=["q_proj", "o_proj", "lm_head"],
        use_rslora=use_rslora,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        use_bdlora=BdLoraConfig(
            target_modules_bd_a=["o_proj"], target_modules_bd_b=["q_proj"], nblocks=4, match_strict=False
        ),
    )
    net = Net()
    model = get_peft_model(net, peft_config)
    model.save_pretrained(str(tmp_path))
    # PEFT's file sorts the patterns, while the first that matches wins: take them in the order in which PEFT had them.
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    fields |= {"rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}
    adapter = Adapter.from_tensors(load_file(tmp_path / "adapter_model.safetensors"), fields, "adapter")
    layers = {name: layer for name, layer in net.named_modules() if hasattr(layer, "lora_A")}
    assert adapter.modules.keys() == layers.keys() and len(layers) == 7
    for name, layer in layers.items():
        module = adapter.modules[name]
        assert (module.in_features, module.out_features) == (layer.in_features, layer.out_features)
        assert module.rank == layer.r["default"]
        assert module.scaling == pytest.approx(layer.scaling["default"], rel=1e-15)
        sides = {"PlainLinear": None, "BlockDiagonalLinear": 4}
        a, b = (sides.get(type(factor["default"]).__name__) for factor in (layer.lora_A, layer.lora_B))
        assert module.side is (BlockSide.A if a else BlockSide.B if b else BlockSide.NONE)
        assert module.nblocks == (a or b or 1)
    weights = [weight for name, weight in model.named_parameters() if "lora_" in name]
    assert adapter.num_parameters == sum(weight.numel() for weight in weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_float_types(dtype: torch.dtype, tmp_path: Path) -> None:
    model = get_peft_model(Net(), LoraConfig(target_modules=["q_proj"])).to(dtype)
    model.save_pretrained(str(tmp_path))
    adapter = Adapter.open(tmp_path)
    assert {adapter.checkpoint.dtype(name) for name in adapter.checkpoint.names()} == {dtype}


def test_names_of_the_state_dict_in_memory() -> None:
    """Callers may hand over ``model.state_dict()`` names, which carry the adapter's name, or names without a prefix."""
    model = get_peft_model(Net(), LoraConfig(target_modules=["q_proj"]))
    tensors = {name: weight for name, weight in model.state_dict().items() if "lora_" in name}
    fields = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj"]}
    long = Adapter.from_tensors(tensors, fields, "state dict")
    short = Adapter.from_tensors(
        {name.removeprefix("base_model.model.").replace(".default", ""): t for name, t in tensors.items()},
        fields,
        "short",
    )
    assert long.modules.keys() == short.modules.keys() == {f"layers.{index}.q_proj" for index in range(3)}
