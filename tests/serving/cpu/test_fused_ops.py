"""Compiled norms, activations and rotary embeddings against SGLang's own, and against float64."""

from itertools import product
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding

from bdlora_sglang.serving.cpu import fused_ops
from bdlora_sglang.serving.hardware import PLATFORM_NAME

HEAD_SIZE = 16
DTYPES = [torch.float32, torch.bfloat16]


def assert_as_close(found: torch.Tensor, native: torch.Tensor, exact: torch.Tensor) -> None:
    """Of the operand's type, and within two roundings of the largest element of a row that size."""
    assert found.dtype is native.dtype and found.shape == native.shape
    unit = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.double(), exact, atol=2 * unit, rtol=2 * unit)
    # SGLang's own rounds after every step.
    torch.testing.assert_close(native.double(), exact, atol=8 * unit, rtol=8 * unit)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_residual", [True, False])
@pytest.mark.parametrize("tokens", [0, 1, 3, 700])
def test_rms_norm(tokens: int, has_residual: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(tokens)
    norm = RMSNorm(67, eps=1e-3).to(dtype)
    norm.weight.data = torch.randn(67, generator=generator).to(dtype)
    x, residual = (torch.randn(tokens, 67, generator=generator).to(dtype) for _ in range(2))
    terms = (x, residual) if has_residual else (x,)
    before = [term.clone() for term in terms]
    with torch.inference_mode():
        found, native = fused_ops._rms_norm(norm, *terms), norm.forward_native(*terms)
    assert all(torch.equal(term, was) for term, was in zip(terms, before, strict=True))
    total = torch.stack([term.double() for term in terms]).sum(0)
    exact = total / (total.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight.double()
    if has_residual:
        assert torch.equal(found[1], native[1])
        found, native = found[0], native[0]
    assert_as_close(found, native, exact)


def test_a_norm_of_zeros_and_of_nan() -> None:
    norm = RMSNorm(8, eps=0.0)
    x = torch.stack([torch.zeros(8), torch.full((8,), float("nan")), torch.ones(8)])
    with torch.inference_mode():
        found, native = fused_ops._rms_norm(norm, x), norm.forward_native(x)
    torch.testing.assert_close(found, native, equal_nan=True)


@pytest.mark.parametrize(
    "options",
    [{"cast_x_before_out_mul": True}, {"fp32_residual": True}, {"var_hidden_size": 4}, {"weight_dtype": torch.float32}],
    ids=str,
)
def test_what_is_left_to_sglang(options: dict[str, Any]) -> None:
    norm = RMSNorm(8, **options)
    x, residual = (torch.randn(3, 8).bfloat16() for _ in range(2))
    with torch.inference_mode():
        found, native = fused_ops._rms_norm(norm, x, residual), norm.forward_native(x, residual)
    assert all(torch.equal(mine, own) for mine, own in zip(found, native, strict=True))


def test_what_layers_hand_on_without_a_value_is_no_reason_to_leave_it_to_sglang(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    norm, x = RMSNorm(8), torch.randn(3, 8)
    monkeypatch.setattr(norm, "forward_native", None)
    with torch.inference_mode():
        found = fused_ops._rms_norm(norm, x, x, None, quant_linear=None)
        assert all(torch.equal(a, b) for a, b in zip(found, fused_ops._rms_norm(norm, x, x), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 8), (1, 2), (1, 40000), (3, 70), (700, 134)], ids=str)
def test_silu_and_mul(shape: tuple[int, int], dtype: torch.dtype) -> None:
    activation = SiluAndMul()
    x = (8 * torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))).to(dtype)
    before = x.clone()
    with torch.inference_mode():
        found, native = fused_ops._silu_and_mul(activation, x), activation.forward_native(x)
    gate, up = x.double().chunk(2, dim=-1)
    assert torch.equal(x, before) and found.is_contiguous()
    assert_as_close(found, native, gate * gate.sigmoid() * up)


def test_silu_of_what_is_large_or_no_number() -> None:
    gate = torch.tensor([float("nan"), float("inf"), float("-inf"), -1e4, 1e4, -89, -88.5, 88.5, -0.0, 0.0])
    x = torch.cat([gate, torch.ones_like(gate)])[None]
    with torch.inference_mode():
        found, native = fused_ops._silu_and_mul(SiluAndMul(), x), SiluAndMul().forward_native(x)
    torch.testing.assert_close(found, native, equal_nan=True)


@pytest.mark.parametrize("x", [torch.randn(3, 8).double(), torch.randn(2, 3, 8), torch.randn(3, 16)[:, ::2]])
def test_activations_that_are_left_to_sglang(x: torch.Tensor) -> None:
    with torch.inference_mode():
        assert torch.equal(fused_ops._silu_and_mul(SiluAndMul(), x), SiluAndMul().forward_native(x))


def check_rotary() -> None:
    """In a process on our platform: elsewhere SGLang makes no rotary embedding without a GPU."""
    from sglang.srt.platforms import current_platform

    fused_ops.register_fused_ops(current_platform.get_dispatch_key_name())
    for tokens, rotated, is_neox_style, dtype in product((1, 5, 300), (HEAD_SIZE, 6), (True, False), DTYPES):
        rope = RotaryEmbedding(HEAD_SIZE, rotated, 512, 10000, is_neox_style, dtype)
        generator = torch.Generator().manual_seed(tokens)
        qkv = torch.randn(tokens, 7 * HEAD_SIZE, generator=generator).to(dtype)
        positions = torch.randint(512, (tokens,), generator=generator)
        parts = [qkv[:, first * HEAD_SIZE : last * HEAD_SIZE] for first, last in ((0, 4), (4, 6), (6, 7))]
        before = [part.clone() for part in parts]
        with torch.inference_mode():
            native = rope.forward_native(positions, *before[:2])
            found = rope(positions, *parts[:2])
        assert found[0].data_ptr() == parts[0].data_ptr(), "it is ours that works in place"
        assert torch.equal(parts[2], before[2])
        cos, sin = (half[:, None] for half in rope.cos_sin_cache.double()[positions].chunk(2, dim=-1))
        for mine, own, was in zip(found, native, before, strict=False):
            x = was.double().view(tokens, was.shape[1] // HEAD_SIZE, HEAD_SIZE)
            left, right = slice(0, rotated // 2), slice(rotated // 2, rotated)
            if not is_neox_style:
                left, right = slice(0, rotated, 2), slice(1, rotated, 2)
            exact = x.clone()
            exact[..., left] = x[..., left] * cos - x[..., right] * sin
            exact[..., right] = x[..., right] * cos + x[..., left] * sin
            assert_as_close(mine, own, exact.flatten(1))


def test_rotary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_PLATFORM", PLATFORM_NAME)
    child = get_context("spawn").Process(target=check_rotary)
    child.start()
    child.join()
    assert child.exitcode == 0
