"""Who adds the LoRA delta: our kernels, and those that can be imported of SGLang's, FlashInfer's and cuBLAS's.

A contender gets a `Problem` and returns a function that adds the delta of set n into ``problem.y_TO``. All that a
server does once a batch (grouping tokens, copying metadata) is done before; what it does in each layer is in the call.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from bdlora_kernels.configurations import Configuration, Configurations, Shape, device_configurations
from bdlora_kernels.launch import Scratch, forward_with_base, make_second_stream, shape_of
from bdlora_kernels.layout import LayerFactors
from bdlora_kernels.tables import SegmentTable, SliceTables
from bdlora_perf.kernels.problem import SCALING, Call, Contender, Problem, base_product


def prepare_ours(problem: Problem, configuration: Configuration | None = None) -> Call:
    """Our Triton kernels alone, with the configuration that this architecture's file gives unless one is given."""
    return prepare_with_base(problem, configuration, overlap=False, base=lambda n: problem.y_TO)


def prepare_with_base(
    problem: Problem,
    configuration: Configuration | None = None,
    overlap: bool | None = None,
    base: Callable[[int], torch.Tensor] | None = None,
) -> Call:
    """The base layer's product and our delta: as the configuration says, or with the shrink beside the product.

    ``base`` returns what the delta of set n is added to, in place of the product.
    """
    device, slices, outputs = problem.x_TI.device, problem.slices(), problem.y_TO.shape[1]
    known = device_configurations(device)
    segments = _segments(problem, known)
    # A layer has a table of its own, which is as cold as its factors are.
    tables = [_slice_tables(problem) for _ in range(problem.num_sets)]
    chosen = configuration or known.choose(shape_of(problem.x_TI, outputs, tables[0], segments))
    if overlap is not None:
        chosen = replace(
            chosen, overlap=overlap, prefetch_b=chosen.prefetch_b and overlap, pdl=chosen.pdl and not overlap
        )
    scratch = Scratch.allocate(segments.max_tokens, tables[0].h_size, segments.max_tokens * chosen.splits, device)
    second_stream, product = make_second_stream(device), base or base_product(problem)
    slots = [slices] * problem.case.adapters
    layers = [
        LayerFactors(a.flatten(1), b.flatten(1), slots) for a, b in zip(problem.a_NSRI, problem.b_NSOr, strict=True)
    ]

    def call(n: int) -> None:
        operands = problem.x_TI, layers[n], tables[n], segments, scratch, chosen, second_stream
        forward_with_base(partial(product, n), outputs, *operands)

    return call


def shape_of_problem(problem: Problem, known: Configurations) -> tuple[Shape, Configuration]:
    """What our configuration is chosen by, and the one that is chosen of those known."""
    shape = shape_of(problem.x_TI, problem.y_TO.shape[1], _slice_tables(problem), _segments(problem, known))
    return shape, known.choose(shape)


def _slice_tables(problem: Problem) -> SliceTables:
    slices, device = problem.slices(), problem.x_TI.device
    tables = SliceTables.allocate(problem.case.adapters, problem.case.rank, sum(part.rank for part in slices), device)
    for slot in range(problem.case.adapters):
        tables.write(slot, slices)
    return tables


def _segments(problem: Problem, known: Configurations) -> SegmentTable:
    tokens, block_tokens = len(problem.slots_T), known.block_tokens(problem.case.phase == "decode")
    segments = SegmentTable(tokens, problem.case.adapters, block_tokens, problem.x_TI.device)
    segments.fill(problem.slots_T, [1] * tokens)
    return segments


def prepare_cublas_loop(problem: Problem) -> Call:
    """Two matrix products a segment and slice, one after the other: what PyTorch alone would do."""
    tokens_by_slot, starts, rank = problem.tokens_by_slot(), problem.output_starts, problem.case.rank

    def call(n: int) -> None:
        for slot, tokens_T in tokens_by_slot.items():
            h_TR = problem.x_TI[tokens_T] @ problem.a_NSRI[n, slot].T
            y_TO = problem.y_TO[tokens_T]
            for i, (start, stop) in enumerate(itertools.pairwise(starts)):
                h_Tr = h_TR[:, i * rank : (i + 1) * rank]
                y_TO[:, start:stop].addmm_(h_Tr, problem.b_NSOr[n, slot, start:stop].T, alpha=SCALING)
            problem.y_TO[tokens_T] = y_TO

    return call


def prepare_copy(problem: Problem) -> Call:
    """A device copy that moves as many bytes as the case must at least: half read, half written."""
    half = problem.case.floor_bytes() // 2
    source = torch.empty(problem.num_sets, half, dtype=torch.uint8, device=problem.x_TI.device)
    target = torch.empty_like(source)
    return lambda n: target[n].copy_(source[n])


def prepare_flashinfer(problem: Problem) -> Call:
    """FlashInfer's segment GEMM: tokens must be sorted, and each slice is a product of its own."""
    from flashinfer.gemm import SegmentGEMMWrapper

    device, starts, rank = problem.x_TI.device, problem.output_starts, problem.case.rank
    order_T = torch.tensor(problem.slots_T).argsort(stable=True).to(device)
    counts = torch.bincount(torch.tensor(problem.slots_T), minlength=problem.case.adapters).to(device)
    gemm = SegmentGEMMWrapper(torch.empty(2**27, dtype=torch.uint8, device=device))

    def product(x: torch.Tensor, weights: torch.Tensor) -> Any:
        return gemm.run(x, weights, problem.case.adapters, weight_column_major=True, seg_lens=counts)

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


def sglang_contenders(with_base: bool = False) -> Mapping[str, Contender]:
    """SGLang's three backends, alone or after the base layer's product, which they may overlap.

    Where SGLang cannot be imported, each fails with the reason, and the others go on.
    """
    try:
        from bdlora_perf.kernels.sglang_contenders import CONTENDERS, WITH_BASE
    except ImportError as error:
        message = f"SGLang's kernels cannot be imported: {error}"
    else:
        return WITH_BASE if with_base else CONTENDERS

    def fail(problem: Problem) -> Call:
        raise RuntimeError(message)

    return dict.fromkeys(("csgmv", "triton", "triton_v2"), fail)
