"""The Triton kernels against dense float64 products, element by element; scratch memory holds NaN before each run."""

import random

import pytest
import torch

from tests.kernels.test_eager import BASE, DTYPES, INPUTS, OUTPUTS, SEGMENTS, SLICES, SLOTS, Window, whole
from tests.kernels.triton_support import (
    CONFIGURATIONS,
    DEVICE,
    MAX_SPLITS,
    NO_SPLITS,
    OVERLAP,
    POISON,
    RUNNABLE,
    SPLITS,
    Request,
    assert_close,
    make_layer,
    make_scratch,
    random_tokens,
    segment_table,
)

if not RUNNABLE:
    pytest.skip("neither a GPU nor TRITON_INTERPRET=1: test_triton_interpreter.py runs these", allow_module_level=True)

from bdlora_kernels.configurations import DECODE_TOKENS, Configuration, load_configurations
from bdlora_kernels.launch import (
    Scratch,
    add_embedding_delta_triton,
    add_lora_delta_triton,
    forward_with_base,
    make_second_stream,
    shape_of,
)
from bdlora_kernels.tables import SegmentTable

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
each_configuration = pytest.mark.parametrize("configuration", CONFIGURATIONS.values(), ids=CONFIGURATIONS)

# Sizes at which 16-byte loads are possible.
WIDE_INPUTS, WIDE_OUTPUTS = 256, 96
WIDE_SLICES: dict[str, list[Window]] = {
    "qkv": [Window(range(WIDE_INPUTS), outputs, 8) for outputs in (range(64), range(64, 80), range(80, 96))],
    "gate-up": [Window(range(WIDE_INPUTS), outputs, 16) for outputs in (range(48), range(48, 96))],
    "row-blocks": [Window(range(start, start + 64), range(WIDE_OUTPUTS), 24) for start in range(0, 256, 64)],
    "even-rank": [Window(range(WIDE_INPUTS), range(WIDE_OUTPUTS), 2)],
}
MIXED = [SLICES["plain-rank16"], SLICES["qkv"], [], SLICES["row-blocks"], SLICES["plain-rank1"]]


def check(
    by_slot: list[list[Window]],
    requests: list[Request],
    dtype: torch.dtype,
    configuration: Configuration | None,
    inputs: int = INPUTS,
    outputs: int = OUTPUTS,
    block_tokens: int = 16,
    usual_ranks: int | None = None,
) -> None:
    layer = make_layer(by_slot, dtype, usual_ranks=usual_ranks)
    x_TI, y_TO = random_tokens(requests, inputs, outputs, dtype)
    tokens = len(x_TI)
    segments = segment_table(requests, len(by_slot), block_tokens)
    scratch = make_scratch(segments, layer.tables.h_size, configuration)
    x, wide_y = x_TI.to(DEVICE), torch.full((tokens, outputs + 3), 7.0, dtype=dtype, device=DEVICE)
    result = wide_y[:, :outputs]
    result.copy_(y_TO)
    add_lora_delta_triton(result, x, layer.factors, layer.tables, segments, scratch, configuration)
    assert (wide_y[:, outputs:] == 7).all()
    assert not segments.counters.any(), "the next launch would not wait"
    assert_close(result.cpu(), y_TO, x_TI, layer.unpacked, requests)


@each_configuration
@pytest.mark.parametrize("requests", SEGMENTS.values(), ids=SEGMENTS)
def test_every_slot_different(requests: list[Request], configuration: Configuration) -> None:
    """Ranks, block counts and scalings in one launch; one slot's adapter does not touch this layer."""
    check(MIXED, requests, torch.bfloat16, configuration)


@each_dtype
@pytest.mark.parametrize("requests", SEGMENTS.values(), ids=SEGMENTS)
def test_every_type(requests: list[Request], dtype: torch.dtype) -> None:
    check(MIXED, requests, dtype, NO_SPLITS)


@each_dtype
@pytest.mark.parametrize("windows", SLICES.values(), ids=SLICES)
def test_odd_slices(windows: list[Window], dtype: torch.dtype) -> None:
    check([windows] * 3, [(2, 5), (0, 1), (BASE, 2), (2, 14)], dtype, NO_SPLITS)


@each_configuration
@pytest.mark.parametrize("windows", WIDE_SLICES.values(), ids=WIDE_SLICES)
def test_wide_slices(windows: list[Window], configuration: Configuration) -> None:
    requests = [(2, 5), (0, 1), (BASE, 2), (2, 14)]
    check([windows] * 3, requests, torch.bfloat16, configuration, WIDE_INPUTS, WIDE_OUTPUTS)


@pytest.mark.parametrize("configuration", [None, OVERLAP], ids=["of-this-device", "overlap"])
@pytest.mark.parametrize("rank", [1, 2, 3, 5, 8, 16, 17, 31, 32, 33, 64, 100, 128, 255, 256])
def test_rank(rank: int, configuration: Configuration | None) -> None:
    """Beside rank 3 in the same launch."""
    by_slot = [[Window(range(40), range(24), rank)], [Window(range(40), range(24), 3)]]
    check(by_slot, [(1, 2), (0, 3)], DTYPES[rank % 3], configuration, 40, 24)


@each_configuration
def test_larger_adapters_than_usual(configuration: Configuration) -> None:
    """In blocks one after the other: the launch has one program for the rows of a tile."""
    check([*MIXED, whole(100)], [(5, 20), (0, 3), (1, 1), (5, 1), (3, 7)], torch.float32, configuration, usual_ranks=8)


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 31, 63, 64, 65, 127, 255, 256, 257, 1001, 4096])
def test_tokens(tokens: int) -> None:
    """Of three slots, and the base model's in between; 32 tokens a tile beyond 256."""
    source = random.Random(tokens)
    requests: list[Request] = []
    while (left := tokens - sum(length for _, length in requests)) > 0:
        requests.append((source.randint(BASE, 2), source.randint(1, max(1, min(left, tokens // 3)))))
    by_slot = [[Window(range(24), range(16), rank)] for rank in (8, 3, 2)]
    check(by_slot, requests, DTYPES[tokens % 3], NO_SPLITS, 24, 16, block_tokens=16 if tokens <= 256 else 32)


@pytest.mark.parametrize("seed", range(20))
def test_any_layout(seed: int) -> None:
    source = random.Random(seed)

    def window(size: int) -> range:
        start = source.randrange(size)
        return range(start, source.randint(start + 1, size))

    shared = window(INPUTS)
    by_slot = [
        [
            Window(
                shared if source.random() < 0.5 else window(INPUTS), window(OUTPUTS), source.choice([1, 2, 4, 7, 8, 40])
            )
            for _ in range(source.randint(0, 5))
        ]
        for _ in range(SLOTS)
    ]
    by_slot[0] = by_slot[0] or whole(2)
    requests = [(source.randint(BASE, SLOTS - 1), source.randint(0, 20)) for _ in range(source.randint(1, 8))]
    check(by_slot, requests, source.choice(DTYPES), source.choice(list(CONFIGURATIONS.values())))


def test_slots_and_batches_may_change() -> None:
    """The same tables and scratch serve other adapters and other batches: nothing of the last ones is left."""
    first = make_layer(MIXED, torch.float32)
    other = make_layer(list(reversed(MIXED)), torch.float32, seed=5)
    segments = SegmentTable(64, SLOTS, 16, DEVICE)
    scratch = Scratch.allocate(64, first.tables.h_size, MAX_SPLITS * 64, DEVICE)
    for layer, requests in (
        (first, SEGMENTS["uniform"]),
        (other, SEGMENTS["interleaved"]),
        (first, SEGMENTS["one-token"]),
    ):
        for slot, slices in enumerate(layer.factors.slices):
            first.tables.write(slot, slices)
        segments.fill([slot for slot, _ in requests], [length for _, length in requests])
        x_TI, y_TO = random_tokens(requests, INPUTS, OUTPUTS, torch.float32)
        # As many rows as a captured launch has: those behind the batch's are padding, in no segment.
        padded_x, padded_y = (torch.full((64, size), POISON, device=DEVICE) for size in (INPUTS, OUTPUTS))
        padded_x[: len(x_TI)], padded_y[: len(y_TO)] = x_TI, y_TO
        scratch.h.fill_(POISON), scratch.partial.fill_(POISON)
        for configuration in (OVERLAP, SPLITS, NO_SPLITS):
            result = padded_y.clone()
            add_lora_delta_triton(result, padded_x, layer.factors, first.tables, segments, scratch, configuration)
            assert_close(result[: len(y_TO)].cpu(), y_TO, x_TI, layer.unpacked, requests)
            assert result[len(y_TO) :].isnan().all()


def test_the_same_bits_every_time() -> None:
    requests = SEGMENTS["skewed"]
    layer = make_layer(MIXED, torch.float32)
    x_TI, y_TO = random_tokens(requests, INPUTS, OUTPUTS, torch.float32)
    results = []
    for _ in range(3):
        result = y_TO.to(DEVICE, copy=True)
        segments = segment_table(requests, SLOTS)
        scratch = make_scratch(segments, layer.tables.h_size, SPLITS)
        add_lora_delta_triton(result, x_TI.to(DEVICE), layer.factors, layer.tables, segments, scratch, SPLITS)
        results.append(result)
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_token_does_not_depend_on_its_batch() -> None:
    """Alone, among others of its slot, and in a prefill: the same bits in deterministic mode."""
    inputs, outputs = 4096 + 64, 24
    layer = make_layer([[Window(range(inputs), range(outputs), rank)] for rank in (8, 3)], torch.float32)
    configurations = load_configurations(90, deterministic=True)
    x_TI, y_TO = random_tokens([(0, 300)], inputs, outputs, torch.float32)
    results = []
    for requests in ([(0, 1)], [(1, 3), (0, 1)], [(0, 40), (1, 7)], [(0, 300)]):
        position = sum(length for slot, length in requests[: [slot for slot, _ in requests].index(0)])
        tokens = sum(length for _, length in requests)
        # The first token of slot 0 is the same in all batches.
        order = [*range(1, position + 1), 0, *range(position + 1, tokens)]
        segments = segment_table(requests, 2, configurations.block_tokens(tokens <= DECODE_TOKENS))
        x, y = x_TI[order].to(DEVICE), y_TO[order].to(DEVICE)
        configuration = configurations.choose(shape_of(x, outputs, layer.tables, segments))
        assert configuration.splits == 2
        scratch = make_scratch(segments, layer.tables.h_size, configuration)
        add_lora_delta_triton(y, x, layer.factors, layer.tables, segments, scratch, configuration)
        results.append(y[position].cpu())
    assert all(torch.equal(result, results[0]) for result in results)


def test_an_aborted_launch_does_not_outlive_its_batch() -> None:
    segments = segment_table([(0, 5)], 1)
    segments.counters.fill_(1)
    segments.fill([0], [5])
    assert not segments.counters.any()


@pytest.mark.parametrize("configuration", [OVERLAP, SPLITS, None], ids=["overlap", "splits", "of-this-device"])
@pytest.mark.parametrize("requests", [SEGMENTS["skewed"], [(BASE, 3)], []], ids=["skewed", "base-only", "no-tokens"])
def test_with_base(requests: list[Request], configuration: Configuration | None) -> None:
    """Layer after layer with one scratch; each may overwrite what the last one read."""
    segments, stream = segment_table(requests, SLOTS), make_second_stream(DEVICE)
    scratch = make_scratch(segments, 160, configuration)
    for seed in range(3):
        layer = make_layer(MIXED, torch.bfloat16, seed)
        x_TI, y_TO = random_tokens(requests, INPUTS, OUTPUTS, torch.bfloat16)
        x, calls = x_TI.to(DEVICE, copy=True), []

        def base(output: torch.Tensor = y_TO, calls: list[int] = calls) -> torch.Tensor:
            calls.append(1)
            return output.to(DEVICE, copy=True)

        scratch.h.fill_(POISON), scratch.partial.fill_(POISON)
        operands = x, layer.factors, layer.tables, segments, scratch, configuration, stream
        result = forward_with_base(base, OUTPUTS, *operands)
        x.fill_(POISON)
        assert calls == [1]
        assert_close(result.cpu(), y_TO, x_TI, layer.unpacked, requests)


@pytest.mark.parametrize("broken", ["x-dtype", "x-columns", "y-columns", "too-many-tokens"])
def test_launchers_refuse(broken: str) -> None:
    layer = make_layer([whole(2)], torch.float32)
    x, y = torch.zeros(4, INPUTS, device=DEVICE), torch.zeros(4, OUTPUTS, device=DEVICE)
    segments = segment_table([(0, 3 if broken == "too-many-tokens" else 4)], 1)
    if broken == "x-dtype":
        x = x.to(torch.bfloat16)
    if broken == "x-columns":
        x = x.T.contiguous().T
    if broken == "y-columns":
        y = y.T.contiguous().T
    scratch = Scratch.allocate(4, 2, 4, DEVICE)
    with pytest.raises(AssertionError):
        add_lora_delta_triton(y, x, layer.factors, layer.tables, segments, scratch, NO_SPLITS)


@each_dtype
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("first_id", [0, 7])
def test_an_embeddings_factors_are_looked_up(dtype: torch.dtype, ids_dtype: torch.dtype, first_id: int) -> None:
    """Against products with one-hot rows: several ranks, an empty slot, the base model, ids that are another rank's."""
    vocabulary = INPUTS
    windows = [[Window(range(vocabulary), range(OUTPUTS), rank)] if rank else [] for rank in (3, 0, 24, 80)]
    layer = make_layer(windows, dtype)
    requests = [(2, 1), (0, 19), (BASE, 3), (3, 1), (1, 2), (2, 17)]
    tokens = sum(length for _, length in requests)
    generator = torch.Generator().manual_seed(2)
    ids_T = torch.randint(0, vocabulary + first_id + 5, (tokens,), generator=generator)
    columns_T = ids_T - first_id
    own_T = (columns_T >= 0) & (columns_T < vocabulary)
    assert own_T.any() and not own_T.all()
    one_hot_TI = torch.nn.functional.one_hot(columns_T.clamp(0, vocabulary - 1), vocabulary) * own_T[:, None]
    y_TO = torch.randn(tokens, OUTPUTS, generator=generator).to(dtype)
    segments = segment_table(requests, len(windows))
    scratch = make_scratch(segments, layer.tables.h_size, NO_SPLITS)
    result_TO = y_TO.to(DEVICE, copy=True)
    tables = layer.tables, segments, scratch
    add_embedding_delta_triton(
        result_TO, ids_T.to(DEVICE, ids_dtype), first_id, layer.factors, *tables, configuration=NO_SPLITS
    )
    assert_close(result_TO.cpu(), y_TO, one_hot_TI.to(dtype), layer.unpacked, requests)
