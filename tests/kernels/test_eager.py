"""`add_lora_delta` against dense float64 products, element by element.

Shape suffixes: T tokens, I inputs, O outputs of this rank, R rank.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

from bdlora_kernels import (
    EagerFactors,
    LayerFactors,
    PackedFactors,
    UnpackedSlice,
    add_lora_delta,
    eager,
    group_tokens,
    pack,
)
from bdlora_kernels.eager import expand, shrink
from bdlora_kernels.layout import align

INPUTS, OUTPUTS = 67, 53  # odd, so that nothing is aligned by luck
SLOTS = 5
BASE = -1


@dataclass(frozen=True)
class Window:
    """A slice to make: ranges of inputs and outputs, and a rank."""

    inputs: range
    outputs: range
    rank: int


def whole(rank: int) -> list[Window]:
    return [Window(range(INPUTS), range(OUTPUTS), rank)]


SLICES: dict[str, list[Window]] = {
    "plain-rank1": whole(1),
    "plain-rank16": whole(16),
    "qkv": [Window(range(INPUTS), outputs, rank) for outputs, rank in
            ((range(29), 8), (range(29, 41), 4), (range(41, 53), 4))],
    "qkv-without-q-and-with-two-blocks-of-v": [Window(range(INPUTS), outputs, 3) for outputs in
                                               (range(29, 41), range(41, 47), range(47, 53))],
    "row-blocks": [Window(range(start, stop), range(OUTPUTS), 4) for start, stop in
                   ((0, 16), (16, 32), (32, 48), (48, 67))],
    "row-blocks-with-padding": [Window(range(3, 12), range(OUTPUTS), 5), Window(range(12, 60), range(OUTPUTS), 5)],
    "one-by-one": [Window(range(7, 8), range(9, 10), 1)],
    "same-inputs-apart": [Window(range(20), range(9), 2), Window(range(20, 67), range(9, 53), 3),
                          Window(range(20), range(9, 53), 2)],
    "same-inputs-same-outputs": [Window(range(INPUTS), range(OUTPUTS), 2), Window(range(INPUTS), range(OUTPUTS), 7)],
}  # fmt: skip

# Requests as (slot, tokens).
SEGMENTS: dict[str, list[tuple[int, int]]] = {
    "distinct": [(slot, 1) for slot in range(SLOTS)],
    "uniform": [(slot, 6) for slot in (3, 0, 2, 1, 4)],
    "skewed": [(2, 41), (0, 1), (1, 1), (2, 3), (4, 1)],
    "identical": [(1, 9), (1, 1), (1, 30)],
    "interleaved": [(slot, 1 + index % 3) for index, slot in enumerate((0, 1, 0, BASE, 1, 2, 0, 2, BASE, 1))],
    "empty-requests": [(0, 0), (1, 4), (0, 0), (1, 0), (2, 2)],
    "one-token": [(3, 1)],
    "base-only": [(BASE, 7), (BASE, 1)],
    "no-tokens": [],
}

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_packed(
    by_slot: Sequence[list[Window]], dtype: torch.dtype, seed: int = 0
) -> tuple[list[PackedFactors | None], list[list[UnpackedSlice]]]:
    """Random factors by slot, packed (None for no slices), and as they were before packing."""
    generator = torch.Generator().manual_seed(seed)

    def random_slice(window: Window, index: int) -> UnpackedSlice:
        a_RI = torch.randn(window.rank, len(window.inputs), generator=generator) / math.sqrt(len(window.inputs))
        b_OR = torch.randn(len(window.outputs), window.rank, generator=generator) / math.sqrt(window.rank)
        scaling = (2.0, 0.75, -1.5, 0.3)[index % 4]
        return UnpackedSlice(a_RI.to(dtype), b_OR.to(dtype), window.inputs.start, window.outputs.start, scaling)

    unpacked = [[random_slice(window, index) for index, window in enumerate(windows)] for windows in by_slot]
    return [pack(parts) if parts else None for parts in unpacked], unpacked


def fill_slots(factors: LayerFactors, packed: Sequence[PackedFactors | None]) -> None:
    """Write ``packed`` into slots that hold NaN wherever nothing is written."""
    factors.a_SE.fill_(float("nan"))
    factors.b_SE.fill_(float("nan"))
    for slot, one in enumerate(packed):
        if one is not None:
            factors.write(slot, one)


def slot_elements(packed: Sequence[PackedFactors | None]) -> tuple[int, int]:
    """A and B elements of slots that have room for all of ``packed``, and for some more."""
    given = [one for one in packed if one is not None]
    return max(one.a_E.numel() for one in given) + 5, max(one.b_E.numel() for one in given) + 5


def make_factors(
    by_slot: Sequence[list[Window]], dtype: torch.dtype, seed: int = 0
) -> tuple[EagerFactors, list[list[UnpackedSlice]]]:
    """Random factors in slots, and as they were before packing."""
    packed, unpacked = make_packed(by_slot, dtype, seed)
    factors = EagerFactors.allocate(len(by_slot), *slot_elements(packed), dtype, torch.device("cpu"))
    fill_slots(factors, packed)
    return factors, unpacked


def dense(
    y_TO: torch.Tensor, x_TI: torch.Tensor, unpacked: list[list[UnpackedSlice]], requests: list[tuple[int, int]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The result in float64; for each element the sum of the magnitudes that went in; and whether any slice did."""
    expected, magnitude = y_TO.double(), y_TO.double().abs()
    touched = torch.zeros(y_TO.shape, dtype=torch.bool)
    slot_of_token = [slot for slot, length in requests for _ in range(length)]
    assert len(slot_of_token) == len(y_TO)
    for token, slot in enumerate(slot_of_token):
        for part in unpacked[slot] if slot >= 0 else []:
            x = x_TI[token, part.input_start : part.input_start + part.a.shape[1]].double()
            outputs = slice(part.output_start, part.output_start + part.b.shape[0])
            a, b = part.a.double(), part.b.double()
            expected[token, outputs] += part.scaling * (b @ (a @ x))
            magnitude[token, outputs] += abs(part.scaling) * (b.abs() @ (a.abs() @ x.abs()))
            touched[token, outputs] = True
    return expected, magnitude, touched


def check(
    by_slot: Sequence[list[Window]], requests: list[tuple[int, int]], dtype: torch.dtype, strided: bool = False
) -> None:
    factors, unpacked = make_factors(by_slot, dtype)
    num_tokens = sum(length for _, length in requests)
    generator = torch.Generator().manual_seed(1)
    x_TI = torch.randn(num_tokens, INPUTS, generator=generator).to(dtype)
    wide = torch.randn(num_tokens, OUTPUTS + (11 if strided else 0), generator=generator).to(dtype)
    y_TO = wide[:, :OUTPUTS]
    before, x_before = wide.clone(), x_TI.clone()
    expected, magnitude, touched = dense(y_TO, x_TI, unpacked, requests)

    segments = group_tokens([slot for slot, _ in requests], [length for _, length in requests], torch.device("cpu"))
    add_lora_delta(y_TO, x_TI, factors, segments)

    assert torch.equal(x_TI, x_before)
    assert torch.equal(wide[:, OUTPUTS:], before[:, OUTPUTS:])
    assert torch.equal(y_TO[~touched], before[:, :OUTPUTS][~touched]), "an output that no slice writes has changed"
    error = (y_TO.double() - expected)[touched]
    if not len(error):
        return
    # One rounding to nearest errs by up to `unit`, relatively. h is rounded once and y once for each slice that adds to
    # the same element: 0.6 of the limit is measured in 16-bit types. Sums inside a product are kept in float32, which
    # only float32 results can feel: 1.9 units are measured.
    unit = torch.finfo(dtype).eps / 2
    sums = dtype == torch.float32
    roundings = 1 + max(_overlap(windows) for windows in by_slot)
    assert (error.abs() <= roundings * unit * (math.sqrt(INPUTS) if sums else 1) * magnitude[touched]).all()
    relative_rms = error.square().mean().sqrt() / expected[touched].square().mean().sqrt()
    assert relative_rms <= math.sqrt(roundings) * unit * (3 if sums else 1), f"{relative_rms / unit:.2f} units"


def _overlap(windows: list[Window]) -> int:
    """How many slices add to the same output, at most."""
    return max((sum(output in window.outputs for window in windows) for output in range(OUTPUTS)), default=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("requests", SEGMENTS.values(), ids=SEGMENTS)
@pytest.mark.parametrize("windows", SLICES.values(), ids=SLICES)
def test_every_slot_alike(windows: list[Window], requests: list[tuple[int, int]], dtype: torch.dtype) -> None:
    check([windows] * SLOTS, requests, dtype)


@pytest.mark.parametrize("strided", [False, True], ids=["packed-y", "strided-y"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("requests", SEGMENTS.values(), ids=SEGMENTS)
def test_every_slot_different(requests: list[tuple[int, int]], dtype: torch.dtype, strided: bool) -> None:
    """Plain and block adapters of several ranks, and one that does not touch this layer, in one batch."""
    by_slot = [SLICES["plain-rank16"], SLICES["qkv"], [], SLICES["row-blocks"], SLICES["plain-rank1"]]
    check(by_slot, requests, dtype, strided)


@pytest.mark.parametrize("supported", [False, True], ids=["widened", "as-they-are"])
@pytest.mark.parametrize("windows", [SLICES["qkv"], SLICES["row-blocks"]], ids=["qkv", "row-blocks"])
def test_many_tokens_on_either_processor(
    windows: list[Window], supported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With instructions for products of bfloat16, and without; a slot's tokens apart, and side by side."""
    monkeypatch.setattr(eager, "has_products", lambda _: supported)
    check([windows] * SLOTS, SEGMENTS["skewed"], torch.bfloat16, strided=True)
    check([windows] * SLOTS, SEGMENTS["identical"], torch.bfloat16)


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_neither_batch_nor_threads_matter(dtype: torch.dtype, num_threads: int) -> None:
    """To the last bit: each token alone in one thread, and all of them."""
    inputs, outputs, ranks = 1027, 8500, (7, 37, 1)  # more outputs and ranks than a thread does at a time
    by_slot = [[Window(range(inputs), range(1, outputs), rank), Window(range(5, 80), range(8300), 2)] for rank in ranks]
    factors, unpacked = make_factors(by_slot, dtype)
    slots = [1, 0, 2, 1, 1, BASE, 2]
    x_TI, y_TO = torch.randn(len(slots), inputs).to(dtype), torch.zeros(len(slots), outputs, dtype=dtype)
    alone = y_TO.clone()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for token, slot in enumerate(slots):
            one = slice(token, token + 1)
            add_lora_delta(alone[one], x_TI[one], factors, group_tokens([slot], [1], torch.device("cpu")))
        torch.set_num_threads(num_threads)
        add_lora_delta(y_TO, x_TI, factors, group_tokens(slots, [1] * len(slots), torch.device("cpu")))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(y_TO, alone)
    expected, _, _ = dense(torch.zeros_like(y_TO), x_TI, unpacked, [(slot, 1) for slot in slots])
    torch.testing.assert_close(y_TO.double(), expected, atol=40 * torch.finfo(dtype).eps, rtol=torch.finfo(dtype).eps)


def test_bfloat16_is_rounded_as_pytorch_does() -> None:
    """Ties, what is too large, infinities and NaN included."""
    largest, infinity, nan = torch.finfo(torch.bfloat16).max, float("inf"), float("nan")
    y_O = torch.tensor([1, 1 + 2**-7, -1, 0, largest, infinity, -infinity, nan, nan, 3], dtype=torch.bfloat16)
    delta_O = torch.tensor([2**-8, 2**-8, -(2**-8), 2**-140, largest, 1, infinity, 1, infinity, nan])
    factors = EagerFactors.allocate(1, align(1), align(len(y_O)), torch.bfloat16, torch.device("cpu"))
    a_RI, b_OR = torch.ones(1, 1, dtype=torch.bfloat16), delta_O.bfloat16()[:, None]
    factors.write(0, pack([UnpackedSlice(a_RI, b_OR, 0, 0, 1.0)]))
    y_TO = y_O[None].clone()
    add_lora_delta(y_TO, a_RI, factors, group_tokens([0], [1], torch.device("cpu")))
    expected = (y_O.float() + b_OR[:, 0].float()).bfloat16()
    torch.testing.assert_close(y_TO[0], expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("few_tokens", [0, 100], ids=["products", "loops"])
@pytest.mark.parametrize("seed", range(4))
def test_loops_and_products_agree(seed: int, few_tokens: int) -> None:
    """Whichever takes a segment, the halves of fully sharded ranks with B over three of them included."""
    factors = EagerFactors.allocate(1, align(4 * INPUTS), align(12 * OUTPUTS), torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    a_RI, b_OR, x_TI, y_TO, others_NTR = (
        torch.randn(*shape, generator=generator)
        for shape in ((4, INPUTS), (OUTPUTS, 12), (6, INPUTS), (6, OUTPUTS), (2, 6, 4))
    )
    factors.write(0, pack([UnpackedSlice(a_RI, b_OR, 0, 0, 0.5)], gathered=3))
    batch = group_tokens([0, BASE, 0], [2, 1, 3], torch.device("cpu"), few_tokens)
    h_TR = shrink(x_TI, factors, batch)
    own = torch.tensor([0, 1, 3, 4, 5])
    torch.testing.assert_close(h_TR[own].double(), x_TI[own].double() @ a_RI.T.double(), atol=1e-4, rtol=1e-5)
    assert not h_TR[2].any()
    expected = y_TO.double()
    expected[own] += 0.5 * torch.cat([h_TR, *others_NTR], dim=1)[own].double() @ b_OR.T.double()
    expand(y_TO, torch.stack([h_TR, *others_NTR]), factors, batch)
    torch.testing.assert_close(y_TO.double(), expected, atol=1e-4, rtol=1e-5)


def test_a_slot_is_written_again() -> None:
    """Another adapter in a slot that has served, and none at last."""
    factors, _ = make_factors([whole(4)] * 2, torch.float32)
    _, unpacked = make_factors([SLICES["plain-rank1"], SLICES["plain-rank1"]], torch.float32, seed=5)
    requests = [(0, 2), (1, 1)]
    batch = group_tokens([0, 1], [2, 1], torch.device("cpu"))
    x_TI = torch.randn(3, INPUTS)
    add_lora_delta(torch.zeros(3, OUTPUTS), x_TI, factors, batch)
    for slot in (0, 1):
        factors.write(slot, pack(unpacked[slot]))
    y_TO = torch.zeros(3, OUTPUTS)
    add_lora_delta(y_TO, x_TI, factors, batch)
    expected, _, _ = dense(torch.zeros(3, OUTPUTS), x_TI, unpacked, requests)
    torch.testing.assert_close(y_TO.double(), expected, atol=1e-5, rtol=1e-5)
    factors.clear(1)
    y_TO = torch.zeros(3, OUTPUTS)
    add_lora_delta(y_TO, x_TI, factors, batch)
    torch.testing.assert_close(y_TO[:2].double(), expected[:2], atol=1e-5, rtol=1e-5)
    assert not y_TO[2].any()


@pytest.mark.parametrize("seed", range(30))
def test_any_layout(seed: int) -> None:
    source = random.Random(seed)

    def window(size: int) -> range:
        start = source.randrange(size)
        return range(start, source.randint(start + 1, size))

    shared = window(INPUTS)
    by_slot = [
        [
            Window(shared if source.random() < 0.5 else window(INPUTS), window(OUTPUTS), source.randint(1, 9))
            for _ in range(source.randint(0, 5))
        ]
        for _ in range(SLOTS)
    ]
    by_slot[0] = by_slot[0] or whole(2)
    requests = [(source.randint(BASE, SLOTS - 1), source.randint(0, 7)) for _ in range(source.randint(1, 12))]
    check(by_slot, requests, source.choice(DTYPES))


def test_a_base_row_of_nan_stays_alone() -> None:
    """A token of one request must not reach another's, whatever it holds."""
    factors, _ = make_factors([whole(4)] * 2, torch.float32)
    x_TI, y_TO = torch.randn(6, INPUTS), torch.zeros(6, OUTPUTS)
    x_TI[2] = float("nan")
    add_lora_delta(y_TO, x_TI, factors, group_tokens([0, BASE, 1], [2, 1, 3], torch.device("cpu")))
    assert y_TO[[0, 1, 3, 4, 5]].isfinite().all() and not y_TO[2].any()
