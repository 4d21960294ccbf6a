"""What is written is PEFT's own format: it loads without a warning about keys, and gives the same deltas."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from bdlora_perf.synthetic import make_adapter
from bdlora_sglang.convert import ConvertOptions, RankChoice, bd2lora, lora2bd, reblock
from tests.convert.oracle import deltas, relative_errors


@pytest.fixture(scope="module")
def base(model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model)


def peft_deltas(base: Any, adapter: Path) -> dict[str, torch.Tensor]:
    """Every module's delta as PEFT computes it: its LoRA path on the identity, for which the base is taken away."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # missing and unexpected keys are warnings
        model = PeftModel.from_pretrained(copy.deepcopy(base), str(adapter))
    found = {}
    for name, layer in model.base_model.model.named_modules():
        if getattr(layer, "lora_A", None):
            eye = torch.eye(layer.in_features)
            with torch.inference_mode():
                found[name] = (layer(eye) - layer.base_layer(eye)).T.double()
    return found


def assert_peft_agrees(base: Any, adapter: Path) -> dict[str, torch.Tensor]:
    found, expected = peft_deltas(base, adapter), deltas(adapter)
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        assert torch.allclose(found[name], delta, atol=2e-5, rtol=1e-4), name
    return found


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_rslora": True, "alpha": 7},
        {"rank_pattern": {"q_proj": 4, "layers.1.mlp.down_proj": 2}, "alpha_pattern": {"o_proj": 3}},
        {"target_modules": ("k_proj", "down_proj"), "layers_to_transform": (1,)},
        {"dtype": torch.bfloat16},
    ],
    ids=["plain", "rslora", "patterns", "subset", "bfloat16"],
)
def test_every_conversion_loads(fields: dict[str, Any], base: Any, model: Path, tmp_path: Path) -> None:
    source = make_adapter(tmp_path / "lora", model, rank=8, **fields)
    expected = peft_deltas(base, source)
    lora2bd(source, tmp_path / "lossless", ConvertOptions(4), lossless=True)
    for name, delta in assert_peft_agrees(base, tmp_path / "lossless").items():
        assert torch.allclose(delta, expected[name], atol=2e-5, rtol=1e-4), name
    lora2bd(source, tmp_path / "error", ConvertOptions(4, RankChoice(max_error=0.5)))
    assert_peft_agrees(base, tmp_path / "error")
    reblock(tmp_path / "lossless", tmp_path / "three", ConvertOptions(3))
    assert_peft_agrees(base, tmp_path / "three")
    bd2lora(tmp_path / "three", tmp_path / "back")
    for name, delta in assert_peft_agrees(base, tmp_path / "back").items():
        assert torch.allclose(delta, expected[name], atol=2e-5, rtol=1e-4), name


def test_adapter_that_peft_trained_as_bdlora(base: Any, model: Path, tmp_path: Path) -> None:
    source = make_adapter(tmp_path / "bd", model, rank=8, nblocks=4)
    expected = peft_deltas(base, source)
    bd2lora(source, tmp_path / "lora")
    reblock(source, tmp_path / "two", ConvertOptions(2))
    reblock(source, tmp_path / "eight", ConvertOptions(8))
    for other in ("lora", "two", "eight"):
        assert max(relative_errors(source, tmp_path / other).values()) == 0
        for name, delta in assert_peft_agrees(base, tmp_path / other).items():
            assert torch.allclose(delta, expected[name], atol=2e-5, rtol=1e-4), name


def test_modules_that_stay_plain(base: Any, model: Path, tmp_path: Path) -> None:
    source = make_adapter(tmp_path / "lora", model, rank=8)
    options = ConvertOptions(
        4,
        RankChoice(rank=8),
        target_modules_bd_a=("down_proj",),
        target_modules_bd_b=("gate", "up_proj"),
        keep_plain=True,
    )
    lora2bd(source, tmp_path / "bd", options)
    expected = peft_deltas(base, source)
    for name, delta in assert_peft_agrees(base, tmp_path / "bd").items():
        assert torch.allclose(delta, expected[name], atol=2e-5, rtol=1e-4) == ("self_attn" in name)
    bd2lora(tmp_path / "bd", tmp_path / "back")
    assert_peft_agrees(base, tmp_path / "back")
