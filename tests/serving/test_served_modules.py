"""Which modules of a model are served: by their whole path, each other one refused with its reason."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bdlora_sglang.adapter import Adapter
from bdlora_sglang.errors import AdapterError
from tests.serving.test_layers import as_rank
from tests.serving.zoo import Zoo

__all__ = ["as_rank"]

HIDDEN = 16


def _tree(layers: dict[str, torch.nn.Module]) -> torch.nn.Module:
    root = torch.nn.Module()
    for path, layer in layers.items():
        parent = root
        *names, leaf = path.split(".")
        for name in names:
            if not hasattr(parent, name):
                parent.add_module(name, torch.nn.Module())
            parent = getattr(parent, name)
        parent.add_module(leaf, layer)
    return root


def _adapter(*modules: str, inputs: int = HIDDEN, outputs: int = HIDDEN) -> Adapter:
    tensors = {}
    for module in modules:
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.ones(2, inputs)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.ones(outputs, 2)
    leaves = [module.rpartition(".")[2] for module in modules]
    return Adapter.from_tensors(
        tensors, {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": leaves}, "test"
    )


@pytest.fixture
def layers(zoo: Zoo, as_rank: Any) -> Any:
    from sglang.srt.layers.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear

    as_rank(0, 1)
    return SimpleNamespace(
        column=lambda: ColumnParallelLinear(HIDDEN, HIDDEN, bias=False, parallel_group="tp"),
        row=lambda: RowParallelLinear(HIDDEN, HIDDEN, bias=False, parallel_group="tp"),
        replicated=lambda: ReplicatedLinear(HIDDEN, HIDDEN, bias=False),
    )


def _found(model: torch.nn.Module, config: Any, *modules: str) -> tuple[list[str], set[str]]:
    from bdlora_sglang.serving.find_modules import find_modules
    from bdlora_sglang.serving.served_modules import served_modules

    found, foreign = find_modules(_adapter(*modules), served_modules(model, config))
    return [part.layer for _, parts in found for part in parts], set(foreign)


TEXT = SimpleNamespace()
MULTIMODAL = SimpleNamespace(vision_config=object())
FC = "layers.0.self_attn.out_proj"


def test_encoder_and_decoder_are_apart(layers: Any) -> None:
    model = _tree({f"model.encoder.{FC}": layers.row(), f"model.decoder.{FC}": layers.row()})
    for half in ("encoder", "decoder"):
        assert _found(model, TEXT, f"model.{half}.{FC}") == ([f"model.{half}.{FC}"], set())
    with pytest.raises(AdapterError, match=r"layers\.0\.self_attn\.out_proj'.*no such parallel layer"):
        _found(model, TEXT, f"model.{FC}")


@pytest.mark.parametrize("around", ["model.", "language_model.model.", "model.language_model.", "language_model.", ""])
@pytest.mark.parametrize("sglangs", ["model.", "language_model.model."])
def test_whatever_the_language_model_is_in(around: str, sglangs: str, layers: Any) -> None:
    model = _tree({f"{sglangs}{FC}": layers.row(), f"vision_tower.encoder.{FC}": layers.row()})
    assert _found(model, MULTIMODAL, f"{around}{FC}") == ([f"{sglangs}{FC}"], set())


def test_two_that_could_be_meant(layers: Any) -> None:
    model = _tree({f"model.{FC}": layers.row(), f"language_model.{FC}": layers.row()})
    with pytest.raises(AdapterError, match=r"it may be one of language_model.*, model"):
        _found(model, TEXT, f"model.{FC}")


def test_what_the_base_model_has_nothing_of(layers: Any) -> None:
    """Of a text model, PEFT ignores it; of a multimodal one it may be there under another name."""
    model = _tree({f"model.{FC}": layers.row(), "model.visual.blocks.0.attn.proj": layers.row()})
    for foreign in ("mtp.layers.0.fc", "model.mtp_layers.3.fc"):
        for config in (TEXT, MULTIMODAL):
            tensors = {f"base_model.model.{foreign}.lora_{factor}.weight" for factor in "AB"}
            assert _found(model, config, f"model.{FC}", foreign) == ([f"model.{FC}"], tensors)
    assert _found(model, TEXT, f"model.{FC}", "model.audio.layers.0.fc")[1]
    with pytest.raises(AdapterError, match=r"audio\.layers\.0\.fc'"):
        _found(model, MULTIMODAL, f"model.{FC}", "model.audio.layers.0.fc")
    with pytest.raises(AdapterError, match=r"visual\.blocks\.0\.attn\.qkv'"):
        _found(model, TEXT, f"model.{FC}", "model.visual.blocks.0.attn.qkv")
    with pytest.raises(AdapterError, match=r"mtp\.layers\.0\.fc'.*no such"):
        _found(model, TEXT, "mtp.layers.0.fc")


def test_what_is_refused_by_name(layers: Any) -> None:
    model = _tree(
        {
            "model.layers.0.self_attn.kv_b_proj": layers.column(),
            "model.layers.0.self_attn.q_a_proj": layers.replicated(),
            f"model.{FC}": layers.row(),
        }
    )
    with pytest.raises(AdapterError, match=r"kv_b_proj'.*absorbs kv_b_proj \(MLA\)"):
        _found(model, TEXT, f"model.{FC}", "model.layers.0.self_attn.kv_b_proj")
    with pytest.raises(AdapterError, match=r"q_a_proj'.*ReplicatedLinear is not supported"):
        _found(model, TEXT, f"model.{FC}", "model.layers.0.self_attn.q_a_proj")
