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
from bdlora_perf.kernels.absent_gpu import Launched, absent_gpu
from bdlora_perf.kernels.contenders import prepare_with_base, shape_of_problem
from bdlora_perf.kernels.problem import Problem, make_problem
from bdlora_perf.kernels.sglang_contenders import CHUNK_SIZE, batch_info, prepare_triton, triton_v2_runner
from bdlora_perf.kernels.shapes import Case

META = torch.device("meta")


@dataclass(frozen=True)
class Served:
    """How a system serves a layer: with ``overlap``, what comes first runs beside the base layer's product.

    ``all_slots``: a product of cuBLAS with the A of all slots comes before its launches; its kernel is not known here.
    """

    overlap: bool = False
    all_slots: bool = False


def ours(problem: Problem, capability: int) -> Served:
    """Shrink and expand."""
    _, configuration = shape_of_problem(problem, load_configurations(capability))
    prepare_with_base(problem, configuration, base=lambda n: problem.y_TO)(0)
    return Served(configuration.overlap)


def csgmv(problem: Problem, capability: int) -> Served:
    """SGLang's csgmv with its default blocks; its own host code asks the GPU for its name to find tuned ones."""
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
    return Served()


def triton(problem: Problem, capability: int) -> Served:
    """SGLang's triton."""
    prepare_triton(problem)(0)
    return Served()


def triton_v2(problem: Problem, capability: int) -> Served:
    """SGLang's triton_v2 by the plan of its runner, which says what runs beside the base layer's product."""
    architecture = "sm90" if capability // 10 == 9 else "sm100" if capability >= 100 else "default"
    runner, plan, offsets = triton_v2_runner(problem, architecture, _RunnerWithoutRoutes)
    if plan.overlap is Overlap.AB_DELTA:
        raise NotImplementedError(f"triton_v2: found overlap {plan.overlap.value}, expected none or a")
    bridge = runner.run_a(problem.x_TI, problem.a_NSRI[0], stack=len(offsets) - 1, plan=plan)
    # Its own `slice_geometry` wants a GPU for the table of offsets.
    block, widths = plan.b_tiles["BLOCK_SIZE_N"], [stop - start for start, stop in pairwise(offsets)]
    uniform = widths[0] if len(set(widths)) == 1 else 0
    table = torch.empty(16, dtype=torch.int32, device=META)
    stride = offsets[1] if all(start == i * offsets[1] for i, start in enumerate(offsets[:-1])) else 0
    geometry = SliceGeometry(
        table[: len(offsets)], table[8:], len(widths), sum(-(-width // block) for width in widths), uniform,
        stride, all(width % block == 0 for width in widths), block,
    )  # fmt: skip
    batch = {"lora_ranks": runner.lora_ranks, "scalings": runner.scalings, "planes": bridge.planes}
    common = {**batch, "geometry": geometry, "config": plan.b_tiles, "add_inplace": True, "zero_sentinel": False}
    tensors = bridge.tensor, problem.b_NSOr[0], problem.y_TO
    if plan.b_family is BFamily.GROUPED:
        grouped_lora_b(*tensors, runner.route(plan.block_size), **common)
    else:
        per_row_lora_b(*tensors, runner.raw_route(), slot_planes=bridge.slot_planes, **common)
    return Served(plan.overlap is Overlap.A, plan.a_family is AFamily.ALL_SLOTS)


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


SYSTEMS: Mapping[str, Callable[[Problem, int], Served]] = {
    "bdlora": ours,
    "csgmv": csgmv,
    "triton": triton,
    "triton_v2": triton_v2,
}


def launches(system: str, case: Case, capability: int) -> tuple[list[Launched], Served]:
    """What ``system`` launches for a case on an architecture (90 for sm_90), compiled, and how it serves with it."""
    problem = make_problem(case, META, cache_bytes=0)
    with absent_gpu(capability) as launched:
        return launched, SYSTEMS[system](problem, capability)
