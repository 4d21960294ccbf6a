"""Initial values: the distribution of plain LoRA's A, which is PEFT's own there, block by block."""

import math
from typing import Any

import pytest
import torch
from peft import get_peft_model
from scipy import stats
from transformers import AutoConfig, AutoModelForCausalLM

from bdlora_perf.quality.init import Init, initialise_like_lora
from bdlora_perf.synthetic.adapters import ALL_MODULES, lora_config
from bdlora_sglang.errors import BDLoRAError

_BLOCKS, _RANK = 8, 64


@pytest.fixture(scope="module")
def base() -> Any:
    """One layer, wide enough for statistics."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=8, num_hidden_layers=1, **shape))


def packed_a(base: Any, nblocks: int, init: Init | None) -> torch.Tensor:
    """A of the down projection, as PEFT keeps it; None leaves PEFT's own values. ``base`` stays as it was."""
    torch.manual_seed(0)
    model = get_peft_model(base, lora_config(_RANK, None if nblocks == 1 else nblocks, ALL_MODULES))
    if init is not None:
        initialise_like_lora(model, 1, init)
    values = model.get_submodule("base_model.model.model.layers.0.mlp.down_proj").lora_A["default"].weight.detach()
    model.unload()
    return values


@pytest.mark.parametrize(
    ("init", "nblocks", "inputs"),
    [("per-block", _BLOCKS, 512 // _BLOCKS), ("whole-layer", _BLOCKS, 512), ("per-block", 1, 512), ("peft", 1, 512)],
)
def test_a_has_the_distribution_of_a_plain_lora(base: Any, init: Init, nblocks: int, inputs: int) -> None:
    """PEFT's plain A of a layer with as many inputs, scaled to them, comes from the same distribution."""
    own = packed_a(base, nblocks, init)
    plain = packed_a(base, 1, None) * math.sqrt(512 / inputs)
    assert stats.ks_2samp(own.flatten().numpy(), plain.flatten().numpy()).pvalue > 0.01
    # The test can tell: PEFT's own blocked values are wider.
    wide = packed_a(base, _BLOCKS, None)
    assert stats.ks_2samp(wide.flatten().numpy(), plain.flatten().numpy()).pvalue < 1e-9


def test_peft_draws_a_block_diagonal_a_wider_than_a_plain_one(base: Any) -> None:
    """What the README tells: by the square root of 6 N."""
    ratio = packed_a(base, _BLOCKS, None).abs().max() / packed_a(base, 1, None).abs().max()
    assert float(ratio) == pytest.approx(math.sqrt(6 * _BLOCKS), rel=0.01)
    ours = packed_a(base, _BLOCKS, "peft")
    assert stats.ks_2samp(ours.flatten().numpy(), packed_a(base, _BLOCKS, None).flatten().numpy()).pvalue > 0.01


def test_values_follow_from_the_seed_alone(base: Any) -> None:
    model = get_peft_model(base, lora_config(8, 2, ALL_MODULES))

    def values(seed: int) -> dict[str, torch.Tensor]:
        initialise_like_lora(model, seed)
        return {name: value.clone() for name, value in model.named_parameters() if "lora_" in name}

    first = values(3)
    torch.rand(7)
    for (name, value), again, other in zip(first.items(), values(3).values(), values(4).values(), strict=True):
        torch.testing.assert_close(value, again, rtol=0, atol=0)
        assert ("lora_B" in name) == torch.equal(value, other), "B is zero"
    model.unload()


def test_refusals(base: Any) -> None:
    with pytest.raises(BDLoRAError, match="--init: found 'zero', expected one of per-block, whole-layer, peft"):
        initialise_like_lora(base, 0, "zero")  # type: ignore[arg-type]
    with pytest.raises(BDLoRAError, match="model: found no LoRA layer of the adapter 'default'"):
        initialise_like_lora(base, 0)
