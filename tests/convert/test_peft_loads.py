"""What is written is PEFT's own format: it loads without a warning about keys, and gives the same deltas."""

import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bdlora_perf.synthetic import make_adapter
from bdlora_sglang.convert import ConvertOptions, RankChoice, bd2lora, lora2bd, reblock
from bdlora_sglang.convert.verify import compare_deltas
from bdlora_sglang.errors import AdapterError
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


@pytest.mark.parametrize(
    "spelling",
    [
        lambda name: name.replace("base_model.model.model.", "base_model.model._orig_mod.model."),
        lambda name: name.replace("base_model.model.model.", "base_model.model."),
        lambda name: name.replace("lora_A.", "lora_A.default."),
        lambda name: name.removeprefix("base_model.model."),
    ],
    ids=["compiled", "no-decoder", "adapter-name", "no-prefix"],
)
def test_names_that_peft_does_not_know(spelling: Any, base: Any, model: Path, tmp_path: Path) -> None:
    """The result has PEFT's own, and verify compares modules whatever they are called."""
    source = make_adapter(tmp_path / "lora", model, rank=8)
    expected = peft_deltas(base, source)
    odd = tmp_path / "odd"
    shutil.copytree(source, odd)
    tensors = load_file(odd / "adapter_model.safetensors")
    save_file({spelling(name): tensor for name, tensor in tensors.items()}, odd / "adapter_model.safetensors")
    lora2bd(odd, tmp_path / "bd", ConvertOptions(4), lossless=True)
    for name, delta in assert_peft_agrees(base, tmp_path / "bd").items():
        assert torch.allclose(delta, expected[name], atol=2e-5, rtol=1e-4), name
    differences = [*compare_deltas(source, odd), *compare_deltas(odd, tmp_path / "bd")]
    assert len(differences) == 2 * len(expected) and max(d.frobenius for d in differences) < 1e-9


def test_output_head(base: Any, model: Path, tmp_path: Path) -> None:
    """Its blocks are of the vocabulary."""
    source = make_adapter(tmp_path / "lora", model, rank=8, target_modules=("lm_head", "q_proj"))
    expected = peft_deltas(base, source)
    lora2bd(source, tmp_path / "bd", ConvertOptions(4), lossless=True)
    bd2lora(tmp_path / "bd", tmp_path / "back")
    for other in ("bd", "back"):
        for name, delta in assert_peft_agrees(base, tmp_path / other).items():
            assert torch.allclose(delta, expected[name], atol=2e-5, rtol=1e-4), name


def test_weights_saved_along_go_along(base: Any, model: Path, tmp_path: Path) -> None:
    """A trained output head and a source in several files; a model card that is not UTF-8 loses nothing."""
    source = make_adapter(tmp_path / "lora", model, rank=8)
    config = json.loads((source / "adapter_config.json").read_text())
    (source / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": ["lm_head"]}))
    head = torch.randn(base.lm_head.weight.shape).to(torch.float16)
    tensors = {**load_file(source / "adapter_model.safetensors"), "base_model.model.lm_head.weight": head}
    (source / "adapter_model.safetensors").unlink()
    parts = [dict(sorted(tensors.items())[part::2]) for part in range(2)]
    for part, own in enumerate(parts):
        save_file(own, source / f"adapter_model-{part}.safetensors")
    weight_map = {name: f"adapter_model-{part}.safetensors" for part, own in enumerate(parts) for name in own}
    (source / "adapter_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (source / "README.md").write_bytes(b"caf\xe9\n")
    lora2bd(source, tmp_path / "bd", ConvertOptions(4), lossless=True)
    assert (tmp_path / "bd" / "README.md").read_bytes().startswith(b"caf\xe9\n\n")
    assert [path.name for path in (tmp_path / "bd").glob("adapter_model*")] == ["adapter_model.safetensors"]
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "bd"))
    assert torch.equal(loaded.base_model.model.lm_head.modules_to_save["default"].weight, head.float())
    assert set(load_file(tmp_path / "bd" / "adapter_model.safetensors")) == set(tensors)


def test_embeddings_stay_plain(model: Path, tmp_path: Path) -> None:
    source = make_adapter(tmp_path / "lora", model, rank=8, target_modules=("embed_tokens", "q_proj"))
    with pytest.raises(AdapterError, match=r"embed_tokens'.*LoRA on an embedding"):
        lora2bd(source, tmp_path / "bd", ConvertOptions(4), lossless=True)
    reblock(source, tmp_path / "same", ConvertOptions(1))
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (source, tmp_path / "same"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
