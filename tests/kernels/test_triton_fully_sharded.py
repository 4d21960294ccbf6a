"""Fully sharded layers on the Triton kernels against dense float64 products, with what the ranks would exchange."""

from functools import partial

import pytest
import torch

from tests.kernels.test_eager import INPUTS, OUTPUTS, SEGMENTS, SLOTS, whole
from tests.kernels.triton_support import (
    DEVICE,
    NO_SPLITS,
    OVERLAP,
    POISON,
    RUNNABLE,
    SHARDED,
    SPLITS,
    Layer,
    assert_close,
    cut,
    make_scratch,
    make_sharded_layer,
    random_tokens,
    segment_table,
)

if not RUNNABLE:
    pytest.skip("neither a GPU nor TRITON_INTERPRET=1: test_triton_interpreter.py runs these", allow_module_level=True)

from bdlora_kernels.configurations import Configuration
from bdlora_kernels.launch import forward_with_base, shrink_launch
from bdlora_kernels.tables import SegmentTable


@pytest.mark.parametrize(("kind", "num_ranks"), [("gather", 2), ("gather", 3), ("reduce", 3)])
@pytest.mark.parametrize(
    ("configuration", "dtype"),
    [(SPLITS, torch.bfloat16), (OVERLAP, torch.float32), (NO_SPLITS, torch.float16)],
    ids=["splits", "overlap", "no-splits"],
)
def test_fully_sharded(configuration: Configuration, dtype: torch.dtype, kind: str, num_ranks: int) -> None:
    """S-LoRA's ranks, one after the other, what they exchange being computed before; batch after batch and adapter
    after adapter in the same tables, with as many rows as a captured launch has."""
    gathers = kind == "gather"
    layers = make_sharded_layer(SHARDED[kind], dtype, num_ranks, gathers)
    inputs, outputs = (
        [slice(None) if gathers else cut(size, num_ranks, rank) for rank in range(num_ranks)]
        for size in (INPUTS, OUTPUTS)
    )
    segments = SegmentTable(64, SLOTS, 16, DEVICE)
    for name, seed in (("skewed", 0), ("base-only", 5), ("one-token", 5)):
        new = make_sharded_layer(SHARDED[kind], dtype, num_ranks, gathers, seed)
        for layer, other in zip(layers, new, strict=True):
            layer.factors.a_SE.copy_(other.factors.a_SE), layer.factors.b_SE.copy_(other.factors.b_SE)
        segments.fill([slot for slot, _ in SEGMENTS[name]], [length for _, length in SEGMENTS[name]])
        x_TI, y_TO = random_tokens(SEGMENTS[name], INPUTS, OUTPUTS, dtype)
        x, y = (torch.full((64, size), POISON, dtype=dtype, device=DEVICE) for size in (INPUTS, OUTPUTS))
        x[: len(x_TI)], y[: len(y_TO)] = x_TI, y_TO
        shrunk = [shrink(layer, x[:, own], segments, configuration) for layer, own in zip(layers, inputs, strict=True)]
        sent = torch.cat(shrunk) if gathers else torch.stack(shrunk).float().sum(0).to(dtype)
        results = []
        for rank, layer in enumerate(layers):
            scratch, result = make_scratch(segments, layer.tables.h_size, configuration), y.clone()[:, outputs[rank]]
            operands = x[:, inputs[rank]], layer.factors, layer.tables, segments, scratch, configuration
            base, exchange = partial(torch.as_tensor, result), partial(exchanged, shrunk[rank], sent)
            forward_with_base(base, result.shape[1], *operands, exchange=exchange)
            results.append(result)
        for result in results if gathers else [torch.cat(results, dim=1)]:
            assert_close(result[: len(y_TO)].cpu(), y_TO, x_TI, new[0].unpacked, SEGMENTS[name], h_is_rounded=True)
            assert result[len(y_TO) :].isnan().all()


def shrink(layer: Layer, x: torch.Tensor, segments: SegmentTable, configuration: Configuration) -> torch.Tensor:
    h_TR = torch.full((len(x), layer.tables.h_size), POISON, dtype=x.dtype, device=DEVICE)
    partial_sums = make_scratch(segments, layer.tables.h_size, configuration).partial
    shrink_launch(h_TR, x, layer.factors, layer.tables, segments, partial_sums, configuration).run()
    return h_TR


def exchanged(expected: torch.Tensor, sent: torch.Tensor, h_TR: torch.Tensor) -> torch.Tensor:
    """What comes back, for a shrink output that is as expected wherever something was written."""
    written = ~expected.isnan()
    assert h_TR.dtype == expected.dtype and torch.equal(h_TR[written], expected[written])
    return sent


def test_nobody_exchanges_for_an_empty_batch() -> None:
    (layer,) = make_sharded_layer([whole(2)], torch.float32, 1, gathers=True)
    segments = segment_table([], 1)
    empty, y = torch.zeros(0, INPUTS, device=DEVICE), torch.zeros(0, OUTPUTS, device=DEVICE)
    operands = empty, layer.factors, layer.tables, segments, make_scratch(segments, 2, NO_SPLITS), NO_SPLITS
    assert forward_with_base(lambda: y, OUTPUTS, *operands, exchange=lambda h_TR: pytest.fail("a collective")) is y
