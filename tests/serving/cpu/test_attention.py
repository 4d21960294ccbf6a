"""Attention against float64 products, request by request. (test_engine.py holds whole models against PEFT.)"""

import pytest
import torch

from bdlora_sglang.serving.cpu import attention
from bdlora_sglang.serving.cpu.decode_attention import attend

POOL = 4096
KV_HEADS, PER_HEAD, HEAD_SIZE = 3, 2, 16
SCALING = 0.3


def oracle(q_HD: torch.Tensor, k_LHD: torch.Tensor, v_LHD: torch.Tensor) -> torch.Tensor:
    """One query of H * G heads over L keys: ``(H * G, D)``."""
    k, v = (x.double().repeat_interleave(PER_HEAD, dim=1) for x in (k_LHD, v_LHD))
    weights = torch.einsum("hd,lhd->hl", q_HD.double(), k).mul(SCALING).softmax(dim=1)
    return torch.einsum("hl,lhd->hd", weights, v)


def pools(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(POOL, KV_HEADS, HEAD_SIZE, generator=generator).to(dtype) for _ in range(2))
    return k, v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("lengths", [[1], [7, 7, 7], [1, 90, 33], [600, 3, 601, 1300, 5]], ids=str)
def test_decode(lengths: list[int], dtype: torch.dtype) -> None:
    keys, values = pools(dtype)
    generator = torch.Generator().manual_seed(1)
    places = [torch.randperm(POOL - 1, generator=generator)[:length] + 1 for length in lengths]
    # A place that no request owns and what is past a request's end must never reach.
    keys[0], values[0] = float("nan"), float("inf")
    table = torch.zeros(2 * len(lengths), max(lengths) + 3, dtype=torch.int32)
    requests = torch.randperm(len(table), generator=generator)[: len(lengths)]
    for request, own in zip(requests, places, strict=True):
        table[request, : len(own)] = own
    q = torch.randn(len(lengths), KV_HEADS, PER_HEAD, HEAD_SIZE, generator=generator).to(dtype)
    # As a part of a fused projection's output is.
    q = torch.cat([q, torch.full_like(q, float("nan"))], dim=1)[:, :KV_HEADS]
    output = attend(q, keys, values, table, requests, torch.tensor(lengths), max(lengths), SCALING)
    for row, place in enumerate(places):
        expected = oracle(q[row].flatten(0, 1), keys[place], values[place])
        torch.testing.assert_close(
            output[row].view_as(expected).double(), expected, atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=1e-5
        )


def test_decode_with_values_of_another_size_and_scores_that_overflow() -> None:
    """Scores of some thousands: their exponentials are infinite, their softmax is not."""
    keys, values = pools(torch.float32)
    q = 1000 * torch.randn(2, KV_HEADS, PER_HEAD, HEAD_SIZE, generator=torch.Generator().manual_seed(1))
    values = values[:, :, :5].contiguous()
    table = torch.arange(40, dtype=torch.int32).view(2, 20)
    output = attend(q, keys, values, table, torch.tensor([1, 0]), torch.tensor([20, 11]), 20, SCALING)
    for row, place in enumerate([table[1], table[0, :11]]):
        expected = oracle(q[row].flatten(0, 1), keys[place], values[place])
        torch.testing.assert_close(output[row].view_as(expected).double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "encoder"])
@pytest.mark.parametrize(
    ("tokens", "length"), [(1, 1), (1, 9), (5, 5), (5, 12), (512, 700), (513, 700), (1100, 1103), (40, 1000)]
)
def test_prefill(tokens: int, length: int, causal: bool) -> None:
    """The last tokens of a sequence, behind a cached prefix or none."""
    keys, values = (pool[:length] for pool in pools(torch.float32))
    q = torch.randn(tokens, KV_HEADS, PER_HEAD, HEAD_SIZE, generator=torch.Generator().manual_seed(2))
    o = torch.full((tokens, KV_HEADS * PER_HEAD, HEAD_SIZE), float("nan"))
    attention._prefill(o, q, keys, values, SCALING, causal)
    for token in {0, 1, tokens // 2, 511, 512, tokens - 1} & set(range(tokens)):
        seen = length - tokens + token + 1 if causal else length
        expected = oracle(q[token].flatten(0, 1), keys[:seen], values[:seen])
        torch.testing.assert_close(o[token].double(), expected, atol=1e-5, rtol=1e-5)
