"""LoRA on bare parameters, read as PEFT computes it."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import ParamWrapper
from safetensors.torch import load_file, save_file
from torch import nn

from bdlora_sglang.adapter import Adapter, ModuleShard, read_slice, slice_module
from bdlora_sglang.adapter.shard import even_cut
from bdlora_sglang.convert import ConvertOptions, lora2bd
from bdlora_sglang.errors import AdapterError

EXPERTS, HIDDEN, INTERMEDIATE = 3, 8, 12
WEIGHTS = "adapter_model.safetensors"


class Experts(nn.Module):
    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed  # as gpt-oss has them
        for name, (out, features) in {
            "gate_up_proj": (2 * INTERMEDIATE, HIDDEN),
            "down_proj": (HIDDEN, INTERMEDIATE),
        }.items():
            shape = (features, out) if is_transposed else (out, features)
            self.register_parameter(name, nn.Parameter(torch.zeros(EXPERTS, *shape)))


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(EXPERTS, HIDDEN))


class MoE(nn.Module):
    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.experts, self.gate, self.q_proj = Experts(is_transposed), Router(), nn.Linear(HIDDEN, HIDDEN)


class Model(nn.Module):
    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([MoE(is_transposed), MoE(is_transposed)])


def saved(folder: Path, is_transposed: bool = False, **fields: Any) -> dict[str, torch.Tensor]:
    """PEFT's adapter in ``folder``, and its deltas by the name of the parameter."""
    torch.manual_seed(0)
    model = get_peft_model(Model(is_transposed), LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **fields))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(str(folder))
    return {
        f"{name.removeprefix('base_model.model.').replace('.base_layer', '')}.{module.parameter_name}": (
            module.get_delta_weight("default").detach()
        )
        for name, module in model.named_modules()
        if isinstance(module, ParamWrapper)
    }


def dense(adapter: Adapter, name: str, tp: int = 2) -> torch.Tensor:
    """A module's delta ``(out, in)``, put together from the slices of shards of its outputs."""
    module = adapter.modules[name]
    delta = torch.zeros(module.out_features, module.in_features)
    for rank in range(tp):
        shard = ModuleShard(range(module.in_features), even_cut(module.out_features, tp, rank))
        for part in slice_module(module, shard):
            factors = read_slice(adapter, part, torch.float32)
            delta[shard.outputs.start : shard.outputs.stop] += factors.scaling * factors.b @ factors.a
    return delta


@pytest.mark.parametrize("is_transposed", [False, True], ids=["out-in", "in-out"])
@pytest.mark.parametrize(
    "fields",
    [
        {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": ["q_proj"]},
        {"target_parameters": ["gate_up_proj", "down_proj"], "target_modules": [], "rank_pattern": {"down_proj": 3}},
        {"target_parameters": ["experts.down_proj"], "target_modules": [], "use_rslora": True},
        {
            "target_parameters": ["gate_up_proj"],
            "target_modules": [],
            "rank_pattern": {r".*\.gate_up_proj": 8},
            "alpha_pattern": {r".*\.gate_up_proj": 5},
        },
        {"target_parameters": ["layers.1.experts.down_proj", "gate.weight"], "target_modules": []},
    ],
    ids=["both", "ranks", "down-rslora", "gate-up-patterns", "router-one-layer"],
)
def test_deltas_are_pefts(tmp_path: Path, fields: dict[str, Any], is_transposed: bool) -> None:
    expected = saved(tmp_path, is_transposed, **fields)
    adapter = Adapter.open(tmp_path)
    found = set()
    for name, delta in expected.items():
        holder, _, parameter = name.rpartition(".")
        modules = [holder] if parameter == "weight" else [f"{holder}.{e}.{parameter}" for e in range(EXPERTS)]
        of_experts = [delta] if parameter == "weight" else list(delta.mT if is_transposed else delta)
        for module, own in zip(modules, of_experts, strict=True):
            torch.testing.assert_close(dense(adapter, module), own)
        found.update(modules)
    assert found == {name for name in adapter.modules if not name.endswith("q_proj")}
    assert not adapter.ignored


def test_tensors_are_read_once(tmp_path: Path) -> None:
    """The columns of an expert are spread over all rows of B."""
    saved(tmp_path, target_parameters=["down_proj"], target_modules=[])
    adapter = Adapter.open(tmp_path)
    for name in adapter.modules:
        dense(adapter, name, tp=1)
    assert adapter.checkpoint.bytes_read == sum(tensor.nbytes for tensor in load_file(tmp_path / WEIGHTS).values())


KEY = "base_model.model.layers.0.experts.lora_"


@pytest.mark.parametrize(
    ("fields", "tensors", "message"),
    [
        ({"target_parameters": ["gate_up_proj_bias"]}, {}, "found 'gate_up_proj_bias', expected the 'weight'"),
        ({"target_parameters": "experts.down_proj", "use_bdlora": {"nblocks": 2}}, {}, "use_bdlora, too"),
        ({"target_parameters": [1]}, {}, "a list of strings"),
        ({"r": 5}, {}, r"shape: found \(12, 12\), expected \(a multiple of 5"),
        ({}, {f"{KEY}B.weight": torch.ones(8, 4)}, r"shape: found \(8, 4\), expected \(\*, 12\): rank 4 of each"),
    ],
    ids=["bias", "bdlora", "number", "rank", "columns"],
)
def test_contradictions(tmp_path: Path, fields: dict[str, Any], tensors: dict[str, Any], message: str) -> None:
    saved(tmp_path, target_parameters=["experts.down_proj"], target_modules=[])
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **fields}))
    save_file({**load_file(tmp_path / WEIGHTS), **tensors}, tmp_path / WEIGHTS)
    with pytest.raises(AdapterError, match=message):
        Adapter.open(tmp_path)


def test_more_wrappers_than_parameters(tmp_path: Path) -> None:
    """PEFT has nothing of that name."""
    saved(tmp_path, target_parameters=["experts.down_proj"], target_modules=[])
    nested = {
        f"base_model.model.layers.0.experts.base_layer.lora_{factor}.weight": torch.ones(12, 12) for factor in "AB"
    }
    save_file({**load_file(tmp_path / WEIGHTS), **nested}, tmp_path / WEIGHTS)
    assert set(Adapter.open(tmp_path).ignored) == set(nested)


def test_converters_refuse_them(tmp_path: Path) -> None:
    saved(tmp_path, target_parameters=["experts.down_proj"], target_modules=["q_proj"])
    with pytest.raises(AdapterError, match=r"target_parameters'.*experts\.down_proj.*not converted"):
        lora2bd(tmp_path, tmp_path / "bd", ConvertOptions(nblocks=2), lossless=True)
