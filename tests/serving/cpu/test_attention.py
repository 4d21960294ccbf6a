"""Batched attention against float64 products, request by request. (test_engine.py holds whole models against PEFT.)"""

import random

import pytest
import torch

from bdlora_sglang.serving.cpu import attention
from bdlora_sglang.serving.cpu.attention import DecodeGroup, group_by_length

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


@pytest.mark.parametrize("seed", range(20))
def test_groups_hold_every_request_once_and_waste_little(seed: int) -> None:
    source = random.Random(seed)
    lengths = [source.choice((1, 3, 90, 100, 300, 500, 4000, 9000)) for _ in range(source.randint(0, 40))]
    groups = group_by_length(lengths)
    assert sorted(place for group in groups for place in group) == list(range(len(lengths)))
    for group in groups:
        own = [lengths[place] for place in group]
        assert min(own) * 2 >= max(own) or max(own) <= 256


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("lengths", [[1], [7, 7, 7], [1, 90, 33], [600, 3, 601, 1300, 5]], ids=str)
def test_decode(lengths: list[int], dtype: torch.dtype) -> None:
    keys, values = pools(dtype)
    generator = torch.Generator().manual_seed(1)
    places = [torch.randperm(POOL - 1, generator=generator)[:length] + 1 for length in lengths]
    # A slot that no request owns and padding must never reach.
    keys[0], values[0] = float("nan"), float("inf")
    q = torch.randn(len(lengths), KV_HEADS, PER_HEAD, HEAD_SIZE, generator=generator).to(dtype)
    groups = group_by_length(lengths)
    output = torch.full_like(q, float("nan"))
    for rows in groups:
        longest = max(lengths[row] for row in rows)
        table = torch.zeros(len(rows), longest, dtype=torch.int32)  # past the end: the slot of NaN
        for place, row in enumerate(rows):
            table[place, : lengths[row]] = places[row]
        own = [lengths[row] for row in rows]
        group = DecodeGroup.of(None if len(groups) == 1 else torch.tensor(rows), table, own, dtype)
        output[rows] = attention._decode(q, keys, values, group, SCALING)
    for row, place in enumerate(places):
        expected = oracle(q[row].flatten(0, 1), keys[place], values[place])
        torch.testing.assert_close(
            output[row].flatten(0, 1).double(), expected, atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=1e-5
        )


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
