"""Packed linear layers: the product, and weights that are read, replaced and shared while they are packed."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bdlora_perf.synthetic.reference import PeftReference
from bdlora_sglang.serving.cpu import linear
from tests.serving.zoo import PROMPTS, Zoo

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "shape", [(0, 67), (1, 67), (2, 67), (3, 67), (4, 67), (5, 67), (33, 67), (2, 3, 67), (1, 1, 67)]
)
def test_product(shape: tuple[int, ...], dtype: torch.dtype, has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(size, generator=generator).to(dtype) for size in ((53, 67), shape))
    bias = torch.randn(53, generator=generator).to(dtype) if has_bias else None
    if not linear.can_pack(weight):
        pytest.skip("this processor has no instructions for the type")
    output = linear.packed_linear(x, linear.pack(weight), bias)
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert output.dtype == dtype and output.shape == (*shape[:-1], 53)
    rounding = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 1e-2}
    torch.testing.assert_close(output.double(), expected, **rounding)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
def test_packing_is_undone_exactly(dtype: torch.dtype) -> None:
    """In place: the parameter keeps its identity and its attributes, because a LoRA wrapper holds it, too."""
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(torch.randn(37, 19).to(dtype), requires_grad=False)
    parameter, before = layer.weight, layer.weight.detach().clone()
    if not linear.can_pack(before):
        pytest.skip("this processor has no instructions for the type")
    parameter.output_dim = 0
    method = linear.PackedLinearMethod()
    for _ in range(2):
        method.process_weights_after_loading(layer)
        assert parameter.is_mkldnn and layer.weight is parameter and parameter.output_dim == 0
        method.process_weights_after_loading(layer)  # once more changes nothing
        method.restore_weights_before_loading(layer)
        assert torch.equal(parameter, before) and parameter.output_dim == 0
    assert list(dict(layer.named_parameters())) == ["weight"]


def test_other_types_stay() -> None:
    for weight in (torch.zeros(3, 4, dtype=torch.float64), torch.zeros(3, 4).to_mkldnn()):
        assert not linear.can_pack(weight) and not linear.is_widened(weight)


@pytest.mark.parametrize("supported", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_sixteen_bits_are_packed_or_widened(
    dtype: torch.dtype, supported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "has_products", lambda _: supported)
    weight = torch.zeros(3, 4, dtype=dtype)
    assert linear.can_pack(weight) is supported and linear.is_widened(weight) is not supported


def test_a_tied_heads_packed_weight_stays_the_same_tensor() -> None:
    """Recorded decode steps hold it; an update of the weights must reach them."""
    layer, method = SimpleNamespace(weight=torch.randn(24, 16)), linear.PackedLogitsMethod()
    method.process_weights_after_loading(layer)
    packed, x = layer.packed_weight, torch.randn(5, 16)
    method.restore_weights_before_loading(layer)
    layer.weight.normal_()
    method.process_weights_after_loading(layer)
    assert layer.packed_weight is packed
    torch.testing.assert_close(linear.packed_linear(x, packed, None), x @ layer.weight.T)


@pytest.fixture(scope="module", params=[pytest.param("llama", marks=pytest.mark.full), "gemma"])  # tied embeddings
def engine(request: pytest.FixtureRequest, zoo: Zoo) -> Iterator[tuple[Any, Path, Path]]:
    from bdlora_sglang import Engine

    model = zoo.model(request.param)
    adapter = zoo.adapter(model, "bd2-r8", rank=8, nblocks=2, seed=4)
    engine = Engine(
        model_path=str(model),
        tp_size=2,
        dtype="float32",
        lora_paths=[f"own={adapter}"],
        skip_tokenizer_init=True,
        log_level="error",
    )
    yield engine, model, adapter
    engine.shutdown()


def test_weights_are_replaced_under_adapters(engine: tuple[Any, Path, Path], zoo: Zoo) -> None:
    """``update_weights_from_disk`` and ``get_weights_by_name`` see the weights as they were loaded."""
    running, model, adapter = engine
    architecture = model.parent.name
    other = zoo.model(architecture, seed=7)
    name = "model.layers.1.self_attn.o_proj.weight"
    for source in (model, other, model):
        success, message, *_ = running.update_weights_from_disk(str(source))
        assert success, message
        reference = PeftReference(source)
        for path in (None, adapter):
            (answer,) = running.generate(
                input_ids=[PROMPTS[0]],
                lora_path=[None if path is None else "own"],
                sampling_params={"temperature": 0, "max_new_tokens": 6, "ignore_eos": True},
            )
            assert answer["output_ids"] == reference.generate(PROMPTS[0], path, 6).tokens, (source, path)
        if architecture == "gemma":  # SGLang's has no `get_weights_by_name`
            continue
        stored = load_file(next(source.glob("*.safetensors")))[name]
        read = torch.tensor(running.get_weights_by_name(name, truncate_size=3))
        torch.testing.assert_close(read, stored[:3])
