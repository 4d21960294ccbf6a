"""Who adds the LoRA delta: our kernels, and those that can be imported of SGLang's, FlashInfer's and cuBLAS's.

A contender gets a `Problem` and returns a function that adds the delta of set n into ``problem.y_TO``. All that a
server does once a batch (grouping tokens, copying metadata) is done before; what it does in each layer is in the call.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec

import torch

from bdlora_kernels.configurations import Configuration, Configurations, Shape, device_configurations
from bdlora_kernels.launch import Scratch, forward_with_base, make_second_stream, shape_of
from bdlora_kernels.layout import LayerFactors
from bdlora_kernels.tables import SegmentTable, SliceTables
from bdlora_perf.kernels.problem import SCALING, Call, Contender, Problem, base_product


def prepare_ours(problem: Problem, configuration: Configuration | None = None) -> Call:
    """Our Triton kernels, with the configuration that this architecture's file gives unless one is given."""
    forward = _prepare_forward(problem, configuration, overlap=False)

    def call(n: int) -> None:
        forward(n, lambda: problem.y_TO)

    return call


def prepare_base(problem: Problem) -> Call:
    """The base layer's own product alone."""
    product = base_product(problem)

    def call(n: int) -> None:
        product(n)

    return call


def prepare_with_base(
    problem: Problem, configuration: Configuration | None = None, overlap: bool | None = None
) -> Call:
    """The base layer's product and our delta: as the configuration says, or with the shrink beside the product."""
    forward, product = _prepare_forward(problem, configuration, overlap), base_product(problem)

    def call(n: int) -> None:
        forward(n, lambda: product(n))

    return call


def _prepare_forward(
    problem: Problem, configuration: Configuration | None, overlap: bool | None = None
) -> Callable[[int, Callable[[], torch.Tensor]], torch.Tensor]:
    """The base layer's output with the delta of set n."""
    device, slices = problem.x_TI.device, problem.slices()
    segments, known = _segments(problem)
    # A layer has a table of its own, which is as cold as its factors are.
    tables = [_slice_tables(problem) for _ in range(problem.num_sets)]
    chosen = configuration or known.choose(shape_of(problem.x_TI, problem.y_TO.shape[1], tables[0], segments))
    if overlap is not None:
        chosen = replace(
            chosen, overlap=overlap, prefetch_b=chosen.prefetch_b and overlap, pdl=chosen.pdl and not overlap
        )
    scratch = Scratch.allocate(segments.max_tokens, tables[0].h_size, segments.max_tokens * chosen.splits, device)
    second_stream = make_second_stream(device)
    slots = [slices] * problem.num_slots
    layers = [
        LayerFactors(a.flatten(1), b.flatten(1), slots) for a, b in zip(problem.a_NSRI, problem.b_NSOr, strict=True)
    ]

    def forward(n: int, base: Callable[[], torch.Tensor]) -> torch.Tensor:
        x_TI, outputs = problem.x_TI, problem.y_TO.shape[1]
        return forward_with_base(base, outputs, x_TI, layers[n], tables[n], segments, scratch, chosen, second_stream)

    return forward


def shape_of_problem(problem: Problem) -> tuple[Shape, Configuration]:
    """What our configuration is chosen by, and the one that is chosen on this device."""
    segments, known = _segments(problem)
    shape = shape_of(problem.x_TI, problem.y_TO.shape[1], _slice_tables(problem), segments)
    return shape, known.choose(shape)


def _slice_tables(problem: Problem) -> SliceTables:
    slices, device = problem.slices(), problem.x_TI.device
    tables = SliceTables.allocate(problem.num_slots, problem.rank, sum(part.rank for part in slices), device)
    for slot in range(problem.num_slots):
        tables.write(slot, slices)
    return tables


def _segments(problem: Problem) -> tuple[SegmentTable, Configurations]:
    device, tokens = problem.x_TI.device, len(problem.slots_T)
    known = device_configurations(device)
    segments = SegmentTable(tokens, problem.num_slots, known.block_tokens(problem.case.phase == "decode"), device)
    segments.fill(problem.slots_T, [1] * tokens)
    return segments, known


def prepare_cublas_loop(problem: Problem) -> Call:
    """Two matrix products a segment and slice, one after the other: what PyTorch alone would do."""
    slots_T, starts, rank = torch.tensor(problem.slots_T), problem.output_starts, problem.rank
    sorted_slots = sorted(set(problem.slots_T))
    tokens = [(slots_T == slot).nonzero().flatten().to(problem.x_TI.device) for slot in sorted_slots]

    def call(n: int) -> None:
        for slot, tokens_T in zip(sorted_slots, tokens, strict=True):
            h_TR = problem.x_TI[tokens_T] @ problem.a_NSRI[n, slot].T
            y_TO = problem.y_TO[tokens_T]
            for i, (start, stop) in enumerate(itertools.pairwise(starts)):
                h_Tr = h_TR[:, i * rank : (i + 1) * rank]
                y_TO[:, start:stop].addmm_(h_Tr, problem.b_NSOr[n, slot, start:stop].T, alpha=SCALING)
            problem.y_TO[tokens_T] = y_TO

    return call


def prepare_copy(problem: Problem) -> Call:
    """A device copy that moves as many bytes as the case must at least: half read, half written."""
    half = replace(problem.case, rank=problem.rank).floor_bytes() // 2
    source = torch.empty(problem.num_sets, half, dtype=torch.uint8, device=problem.x_TI.device)
    target = torch.empty_like(source)

    def call(n: int) -> None:
        target[n].copy_(source[n])

    return call


def prepare_flashinfer(problem: Problem) -> Call:
    """FlashInfer's segment GEMM: tokens must be sorted, and each slice is a product of its own."""
    from flashinfer.gemm import SegmentGEMMWrapper

    device, starts, rank = problem.x_TI.device, problem.output_starts, problem.rank
    order_T = torch.tensor(problem.slots_T).argsort(stable=True).to(device)
    counts = torch.bincount(torch.tensor(problem.slots_T), minlength=problem.num_slots).to(device)
    gemm = SegmentGEMMWrapper(torch.empty(2**27, dtype=torch.uint8, device=device))

    def product(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = gemm.run(x, weights, problem.num_slots, weight_column_major=True, seg_lens=counts)
        return result

    def call(n: int) -> None:
        h_TR = product(problem.x_TI[order_T], problem.a_NSRI[n])
        for i, (start, stop) in enumerate(itertools.pairwise(starts)):
            h_Tr = h_TR[:, i * rank : (i + 1) * rank].contiguous()
            delta = product(h_Tr, problem.b_NSOr[n, :, start:stop].contiguous())
            problem.y_TO[order_T, start:stop] += SCALING * delta

    return call


def same_factors(device: torch.device) -> Mapping[str, Contender]:
    """The contenders that can run on the device, on the factors of the case; ours first."""
    found: dict[str, Contender] = {"bdlora": prepare_ours, "cublas_loop": prepare_cublas_loop, "copy": prepare_copy}
    if device.type != "cuda":
        return found
    if find_spec("flashinfer") is not None:
        found["flashinfer"] = prepare_flashinfer
    return {**found, **sglang_contenders()}


def sglang_contenders() -> Mapping[str, Contender]:
    """SGLang's three backends; where SGLang cannot be imported, each fails with the reason, and the others go on."""
    return _of_sglang("CONTENDERS", ("csgmv", "triton", "triton_v2"))


def sglang_with_base() -> Mapping[str, Contender]:
    """The base layer's product with each of SGLang's backends, which may overlap the two."""
    return _of_sglang("WITH_BASE", ("csgmv_with_base", "triton_with_base", "triton_v2_with_base"))


def _of_sglang(group: str, names: Sequence[str]) -> Mapping[str, Contender]:
    try:
        found: Mapping[str, Contender] = getattr(import_module("bdlora_perf.kernels.sglang_contenders"), group)
        return found
    except ImportError as error:
        message = f"SGLang's kernels cannot be imported: {error}"

    def fail(problem: Problem) -> Call:
        raise RuntimeError(message)

    return dict.fromkeys(names, fail)
