"""Who adds LoRA, launched on tensors without memory for a GPU that is not there: ours and SGLang's backends.

Each is launched by its own host code inside of `bdlora_perf.kernels.absent_gpu.absent_gpu`, with the configuration or
the plan that it would choose on that architecture.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from sglang.kernels.ops.lora.common.lora_b import SliceGeometry, grouped_lora_b, per_row_lora_b
from sglang.kernels.ops.lora.common.route_view import RouteView, RouteViewKind
from sglang.kernels.ops.lora.dense.chunked_sgmv_expand import _chunked_lora_expand_kernel
from sglang.kernels.ops.lora.dense.chunked_sgmv_shrink import _chunked_lora_shrink_kernel
from sglang.kernels.ops.lora.dense.lora_tuning_config import DEFAULT_EXPAND_CONFIG, DEFAULT_SHRINK_CONFIG
from sglang.srt.lora.dense.plan import AFamily, BFamily, Overlap
from sglang.srt.lora.dense.runner import DenseLoraRunner

from bdlora_kernels.configurations import load_configurations
from bdlora_kernels.launch import Scratch, expand_launch, shape_of, shrink_launch
from bdlora_kernels.layout import LayerFactors
from bdlora_kernels.tables import SegmentTable, SliceTables
from bdlora_perf.kernels.absent_gpu import Launched, absent_gpu
from bdlora_perf.kernels.problem import Problem
from bdlora_perf.kernels.sglang_contenders import CHUNK_SIZE, batch_info, prepare_triton, triton_v2_runner
from bdlora_perf.kernels.shapes import Case

META = torch.device("meta")


@dataclass(frozen=True)
class Launches:
    """What one layer launches: with ``overlap`` first ``beside`` the base layer's product, then ``after`` it.

    ``all_slots``: the product with A is one of cuBLAS with the A of all slots, whose kernel is not known here.
    """

    beside: tuple[Launched, ...]
    after: tuple[Launched, ...]
    overlap: bool
    all_slots: bool


@dataclass
class _Recorder:
    """Which of the launches so far run beside the base layer's product."""

    problem: Problem
    capability: int
    launched: list[Launched]
    first: int = 0
    beside: bool = False
    all_slots: bool = False

    def rest_is_after(self) -> None:
        self.first, self.beside = len(self.launched), True


def ours(recorder: _Recorder) -> None:
    """Shrink and expand."""
    problem = recorder.problem
    shape, tokens, decode = problem.case.shape(), problem.case.tokens, problem.case.phase == "decode"
    configurations = load_configurations(recorder.capability)
    tables = SliceTables.allocate(problem.num_slots, problem.rank, problem.rank * len(shape.outputs), META)
    segments = SegmentTable(tokens, problem.num_slots, configurations.block_tokens(decode), META)
    elements = problem.a_NSRI[0, 0].numel() + problem.b_NSOr[0, 0].numel()
    slots_SE = torch.empty(problem.num_slots, elements, dtype=problem.x_TI.dtype, device=META)
    factors = LayerFactors(slots_SE, slots_SE, [()] * problem.num_slots)
    scratch = Scratch.for_segments(segments, configurations, tables.h_size, META)
    configuration = configurations.choose(shape_of(problem.x_TI, shape.total_outputs, tables, segments))
    h_TR = scratch.h_TR(tokens, tables.h_size)
    shrink_launch(h_TR, problem.x_TI, factors, tables, segments, scratch.partial, configuration).run()
    if configuration.overlap:
        recorder.rest_is_after()
    expand_launch(problem.y_TO, h_TR, slots_SE, tables.expand, segments, configuration).run()


def csgmv(recorder: _Recorder) -> None:
    """SGLang's csgmv with its default blocks; its own host code asks the GPU for its name to find tuned ones."""
    problem = recorder.problem
    info, starts = batch_info(problem, CHUNK_SIZE), tuple(problem.output_starts)
    x_TI, a_SRI, b_SOr = problem.x_TI, problem.a_NSRI[0], problem.b_NSOr[0]
    (_, rows, inputs), (_, outputs, rank), slices = a_SRI.shape, b_SOr.shape, len(starts) - 1
    h_TR = torch.empty(len(x_TI), rows, dtype=x_TI.dtype, device=META)
    batch = info.seg_indptr, info.weight_indices, info.lora_ranks, info.permutation, info.num_segments
    _chunked_lora_shrink_kernel[(-(-rows // DEFAULT_SHRINK_CONFIG["BLOCK_N"]), info.num_segments)](
        x_TI, a_SRI, h_TR, *batch,
        N=rows, K=inputs, NUM_SLICES=slices, BLOCK_M=CHUNK_SIZE, **DEFAULT_SHRINK_CONFIG,
    )  # fmt: skip
    tiles = sum(-(-(stop - start) // DEFAULT_EXPAND_CONFIG["BLOCK_N"]) for start, stop in pairwise(starts))
    _chunked_lora_expand_kernel[(tiles, info.num_segments)](
        h_TR, b_SOr, problem.y_TO, *problem.y_TO.stride(), *batch, info.scalings, torch.empty(4, device=META).int(),
        NUM_SLICES=slices, OUTPUT_DIM=outputs, MAX_RANK=rank, BLOCK_M=CHUNK_SIZE, SLICE_OFFSETS=starts,
        **DEFAULT_EXPAND_CONFIG,
    )  # fmt: skip


def triton(recorder: _Recorder) -> None:
    """SGLang's triton."""
    prepare_triton(recorder.problem)(0)


def triton_v2(recorder: _Recorder) -> None:
    """SGLang's triton_v2 by the plan of its runner, which says what runs beside the base layer's product."""
    problem, capability = recorder.problem, recorder.capability
    architecture = "sm90" if capability // 10 == 9 else "sm100" if capability >= 100 else "default"
    runner, plan, offsets = triton_v2_runner(problem, architecture, _RunnerWithoutRoutes)
    if plan.overlap is Overlap.AB_DELTA:
        raise NotImplementedError(f"triton_v2: found overlap {plan.overlap.value}, expected none or a")
    bridge = runner.run_a(problem.x_TI, problem.a_NSRI[0], stack=len(offsets) - 1, plan=plan)
    recorder.all_slots = plan.a_family is AFamily.ALL_SLOTS
    if plan.overlap is Overlap.A:
        recorder.rest_is_after()
    # Its own `slice_geometry` wants a GPU for the table of offsets.
    block, widths = plan.b_tiles["BLOCK_SIZE_N"], [stop - start for start, stop in pairwise(offsets)]
    uniform = widths[0] if len(set(widths)) == 1 else 0
    table = torch.empty(16, dtype=torch.int32, device=META)
    stride = offsets[1] if all(start == i * offsets[1] for i, start in enumerate(offsets[:-1])) else 0
    geometry = SliceGeometry(
        table[: len(offsets)], table[8:], len(widths), sum(-(-width // block) for width in widths), uniform,
        stride, all(width % block == 0 for width in widths), block,
    )  # fmt: skip
    common = {"geometry": geometry, "config": plan.b_tiles, "add_inplace": True, "zero_sentinel": False}
    common |= {"lora_ranks": runner.lora_ranks, "scalings": runner.scalings, "planes": bridge.planes}
    if plan.b_family is BFamily.GROUPED:
        route = runner.route(plan.block_size)
        grouped_lora_b(bridge.tensor, problem.b_NSOr[0], problem.y_TO, route, **common)
    else:
        common["slot_planes"] = bridge.slot_planes
        per_row_lora_b(bridge.tensor, problem.b_NSOr[0], problem.y_TO, runner.raw_route(), **common)


class _RunnerWithoutRoutes(DenseLoraRunner):  # type: ignore[misc, unused-ignore]
    """SGLang's runner, with routes of the size of its own, which nobody fills: that happens once for all layers."""

    def _build_route(self, key: tuple[str, int]) -> RouteView:
        _, block_size = key
        tokens, buckets = len(self.token_slots), self.max_loras + 1
        blocks = -(-(tokens + min(tokens, buckets) * (block_size - 1)) // block_size)
        sorted_ids, bucket_ids, padded = (
            torch.empty(size, dtype=torch.int32, device=META) for size in (blocks * block_size, blocks, 1)
        )
        return RouteView(
            view=RouteViewKind.ALIGNED, block_size=block_size, token_slots=self.token_slots, group_ids=None,
            groups_per_slot=1, max_loras=self.max_loras, maybe_sorted_pair_ids=sorted_ids,
            maybe_block_bucket_ids=bucket_ids, maybe_num_pairs_post_padded=padded,
        )  # fmt: skip


SYSTEMS: Mapping[str, Callable[[_Recorder], None]] = {
    "bdlora": ours,
    "csgmv": csgmv,
    "triton": triton,
    "triton_v2": triton_v2,
}


def launches(system: str, case: Case, capability: int) -> Launches:
    """What ``system`` launches for a case on an architecture (90 for sm_90), compiled."""
    with absent_gpu(capability) as launched:
        recorder = _Recorder(meta_problem(case), capability, launched)
        SYSTEMS[system](recorder)
    first = recorder.first
    return Launches(tuple(launched[:first]), tuple(launched[first:]), recorder.beside, recorder.all_slots)


def meta_problem(case: Case) -> Problem:
    """A problem without memory."""
    shape, rank = case.shape(), case.rank

    def empty(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=getattr(torch, case.dtype), device=META)

    return Problem(
        case=case,
        rank=rank,
        slots_T=case.slots(),
        x_TI=empty(case.tokens, shape.inputs),
        y_TO=empty(case.tokens, shape.total_outputs),
        a_NSRI=empty(1, case.adapters, rank * len(shape.outputs), shape.inputs),
        b_NSOr=empty(1, case.adapters, shape.total_outputs, rank),
    )
