"""A captured CUDA graph serves other adapters, ranks and batches than those it was captured with."""

from dataclasses import replace

import pytest
import torch

from tests.kernels.test_eager import SEGMENTS, SLICES, SLOTS
from tests.kernels.triton_support import (
    DEVICE,
    OVERLAP,
    SHARDED,
    SPLITS,
    make_layer,
    make_scratch,
    make_sharded_layer,
    random_tokens,
)

if not torch.cuda.is_available():
    pytest.skip("CUDA graphs need a GPU", allow_module_level=True)

from bdlora_kernels.configurations import Configuration
from bdlora_kernels.launch import forward_with_base, make_second_stream
from bdlora_kernels.tables import SegmentTable

WIDE = torch.cuda.get_device_capability() >= (9, 0)
INPUTS, OUTPUTS, TOKENS = 67, 53, 64
MIXED = [SLICES["plain-rank16"], SLICES["qkv"], [], SLICES["row-blocks"], SLICES["plain-rank1"]]


@pytest.mark.parametrize("exchanges", [False, True], ids=["", "fully-sharded"])
@pytest.mark.parametrize(
    "configuration",
    [SPLITS, replace(SPLITS, pdl=WIDE), OVERLAP],
    ids=["serial", "serial-with-pdl", "overlap"],
)
def test_replay_is_eager(configuration: Configuration, exchanges: bool) -> None:
    """``exchanges``: with what an all-gather of two ranks leaves where both hold the same."""
    if exchanges and configuration.pdl:
        pytest.skip("another kernel comes between shrink and expand")
    both = [make_layer(slots, torch.bfloat16, seed) for slots, seed in ((MIXED, 0), (list(reversed(MIXED)), 5))]
    if exchanges:
        both = [make_sharded_layer(SHARDED["gather"], torch.bfloat16, 2, gathers=True, seed=seed)[0] for seed in (0, 5)]
    static, other = both
    segments = SegmentTable(TOKENS, SLOTS, 16, DEVICE)
    scratch = make_scratch(segments, static.tables.h_size, configuration)
    second_stream = make_second_stream(DEVICE)
    x, y = (torch.zeros(TOKENS, size, dtype=torch.bfloat16, device=DEVICE) for size in (INPUTS, OUTPUTS))

    def run() -> None:
        operands = x, static.factors, static.tables, segments, scratch, configuration, second_stream
        exchange = (lambda h_TR: torch.cat([h_TR, h_TR])) if exchanges else None
        forward_with_base(lambda: y, OUTPUTS, *operands, exchange)

    segments.fill([], [])
    run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for layer, name in ((static, "uniform"), (other, "interleaved"), (static, "skewed"), (other, "base-only")):
        requests = SEGMENTS[name]
        static.factors.a_SE.copy_(layer.factors.a_SE)
        static.factors.b_SE.copy_(layer.factors.b_SE)
        for slot, slices in enumerate(layer.factors.slices):
            static.tables.write(slot, slices)
        segments.fill([slot for slot, _ in requests], [length for _, length in requests])
        x_TI, y_TO = random_tokens(requests, INPUTS, OUTPUTS, torch.bfloat16)
        x[: len(x_TI)], y[: len(y_TO)] = x_TI.to(DEVICE), y_TO.to(DEVICE)
        before = y.clone()
        scratch.h.fill_(float("nan"))
        graph.replay()
        replayed = y.clone()
        y.copy_(before)
        scratch.h.fill_(float("nan"))
        run()
        assert torch.equal(replayed, y) and torch.equal(replayed.isnan(), y.isnan())
        assert not torch.equal(replayed, before) or name == "base-only"


def test_filling_tables_does_not_wait() -> None:
    """With the device busy, the host goes on."""
    layer = make_layer(MIXED, torch.bfloat16)
    segments = SegmentTable(TOKENS, SLOTS, 16, DEVICE)
    for busy in (False, True):  # the first time, pinned memory is allocated
        torch.cuda.synchronize()
        if busy:
            torch.cuda._sleep(1_000_000_000)
        segments.fill([0, 1], [3, 4])
        layer.tables.write(0, layer.factors.slices[1])
    done = torch.cuda.Event()
    done.record()
    assert not done.query()
    torch.cuda.synchronize()
