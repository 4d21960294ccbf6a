"""Made models and adapters: as large as they are said to be, made once, and never half written."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bdlora_perf.serve.adapters import matched_adapter, synthetic_model
from bdlora_perf.serve.systems import SYSTEMS, AdapterShape
from bdlora_sglang.errors import BDLoRAError

# One layer of each: the ratio does not depend on the number of layers.
_LLAMA_31: dict[str, dict[str, Any]] = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8},
}


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Writing more to a file fails, as on a full disk (with another errno)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("size", "system", "published"),
    [("8b", "bd-2r", 0.86), ("8b", "bd-4r", 1.73), ("70b", "bd-2r", 0.87), ("70b", "bd-4r", 1.74)],
)
def test_parameters_match_as_in_the_paper(tmp_path: Path, size: str, system: str, published: float) -> None:
    from transformers import LlamaConfig

    model = tmp_path / "model"
    LlamaConfig(num_hidden_layers=1, **_LLAMA_31[size]).save_pretrained(model)
    shape = SYSTEMS[system].adapter(4, 8)
    assert shape is not None
    bd = matched_adapter(tmp_path, str(model), shape, seed=0)
    plain = matched_adapter(tmp_path, str(model), AdapterShape(4, None), seed=0)
    assert round(bd.parameters / plain.parameters, 2) == published
    tensors = load_file(bd.folder / "adapter_model.safetensors")
    assert bd.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_made_once_and_every_token_has_a_text(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = synthetic_model(tmp_path, 512, 1, seed=3)
    written = (model / "model.safetensors").stat().st_mtime_ns
    assert synthetic_model(tmp_path, 512, 1, seed=3) == model
    assert (model / "model.safetensors").stat().st_mtime_ns == written
    assert synthetic_model(tmp_path, 512, 1, seed=4) != model
    # Without it, a quarter of the tokens are halves of characters, and the first text can come late.
    prompts = torch.arange(6, 262).reshape(64, 4)
    logits = AutoModelForCausalLM.from_pretrained(model)(prompts).logits
    texts = AutoTokenizer.from_pretrained(model).batch_decode(logits.argmax(-1).reshape(-1, 1))
    assert len(set(texts)) > 100
    assert all(text and "\ufffd" not in text and not text.startswith("<|") for text in texts)


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    with largest_file(50_000), pytest.raises(BDLoRAError, match=r"llama-h512-l1-s0: found .*[Ff]ile too large"):
        synthetic_model(tmp_path, 512, 1, seed=0)
    assert list((tmp_path / "models").iterdir()) == []


def test_sizes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BDLoRAError, match="--hidden-size: found 500, expected a multiple of 512"):
        synthetic_model(tmp_path, 500, 1, seed=0)
    model = synthetic_model(tmp_path, 512, 1, seed=0)
    with pytest.raises(BDLoRAError, match="--tp: found a model that 3 blocks do not fit"):
        matched_adapter(tmp_path, str(model), AdapterShape(6, 3), seed=0)
