"""One case on the GPU: random tokens and factors, more sets of factors than the cache holds, and the exact result."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bdlora_kernels.layout import Slice
from bdlora_perf.kernels.shapes import Case

# Adds the delta of set n into the problem's y; what it returns is of no interest.
Call = Callable[[int], object]

SCALING = 0.5
_MAX_SETS = 128


@dataclass(frozen=True)
class Problem:
    """Tensors of a case.

    Shape suffixes: N sets, S slots, R ranks of all slices together, I inputs, O outputs, r rank of a slice, T tokens.
    A decode step reads the factors of each layer once, so no factor is in the cache: set after set is used in turn.
    """

    case: Case
    slots_T: list[int]
    x_TI: torch.Tensor
    y_TO: torch.Tensor
    a_NSRI: torch.Tensor
    b_NSOr: torch.Tensor

    @property
    def num_sets(self) -> int:
        return len(self.a_NSRI)

    @property
    def output_starts(self) -> list[int]:
        """Where the slices' outputs start, and where the last one's stop."""
        return list(itertools.accumulate(self.case.shape().outputs, initial=0))

    def slices(self) -> tuple[Slice, ...]:
        """What a slot holds, in the kernels' own terms: the same bytes as ``a_NSRI[n, s]`` and ``b_NSOr[n, s]``."""
        inputs, rank = self.case.shape().inputs, self.case.rank
        return tuple(
            Slice(0, inputs, start, size, rank, i * rank * inputs, start * rank, SCALING)
            for i, (start, size) in enumerate(zip(self.output_starts, self.case.shape().outputs, strict=False))
        )

    def tokens_by_slot(self) -> dict[int, torch.Tensor]:
        """Of the adapters in the batch."""
        slots_T = torch.tensor(self.slots_T)
        return {slot: (slots_T == slot).nonzero().flatten().to(self.x_TI.device) for slot in sorted(set(self.slots_T))}

    def exact(self) -> torch.Tensor:
        """The result for the first set in float64."""
        expected, rank = self.y_TO.to(torch.float64, copy=True), self.case.rank
        for slot, tokens_T in self.tokens_by_slot().items():
            h_TR = self.x_TI[tokens_T].double() @ self.a_NSRI[0, slot].double().T
            for i, (start, stop) in enumerate(itertools.pairwise(self.output_starts)):
                h_Tr = h_TR[:, i * rank : (i + 1) * rank]
                expected[tokens_T, start:stop] += SCALING * h_Tr @ self.b_NSOr[0, slot, start:stop].double().T
        return expected

    def exact_base(self) -> torch.Tensor:
        """The base layer's product for the first set in float64."""
        return self.x_TI.double() @ base_weight(self).double().T


Contender = Callable[[Problem], Call]


def make_problem(case: Case, device: torch.device, cache_bytes: int, max_sets: int = _MAX_SETS) -> Problem:
    """Random tensors; as many sets of factors as fill the cache twice. On PyTorch's "meta" device nothing is random."""
    shape, dtype = case.shape(), getattr(torch, case.dtype)
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)
    rank, ranks = case.rank, case.rank * len(shape.outputs)
    slots_T = case.slots()
    used_bytes = len(set(slots_T)) * (ranks * shape.inputs + rank * shape.total_outputs) * dtype.itemsize
    sets = max(2, min(max_sets, -(-2 * cache_bytes // used_bytes)))

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype)

    return Problem(
        case=case,
        slots_T=slots_T,
        x_TI=random(case.tokens, shape.inputs),
        y_TO=random(case.tokens, shape.total_outputs),
        a_NSRI=random(sets, case.adapters, ranks, shape.inputs).mul_(shape.inputs**-0.5),
        b_NSOr=random(sets, case.adapters, shape.total_outputs, rank).mul_(rank**-0.5),
    )


def base_weight(problem: Problem) -> torch.Tensor:
    """The base layer's weight of set 0, ``(outputs, inputs)``; the same each time."""
    shape, x_TI = problem.case.shape(), problem.x_TI
    generator = torch.Generator(x_TI.device).manual_seed(1)
    size = shape.total_outputs, shape.inputs
    weight_OI = torch.randn(*size, generator=generator, device=x_TI.device, dtype=x_TI.dtype)
    return weight_OI.mul_(shape.inputs**-0.5)


def base_product(problem: Problem) -> Callable[[int], torch.Tensor]:
    """The base layer's product of set n into the problem's y: weights that fill the cache twice are used in turn."""
    weight_OI, device = base_weight(problem), problem.x_TI.device
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    copies = max(1, min(problem.num_sets, -(-2 * cache_bytes // weight_OI.nbytes)))
    weights_NOI = [weight_OI, *(weight_OI.clone() for _ in range(copies - 1))]
    return lambda n: torch.mm(problem.x_TI, weights_NOI[n % copies].T, out=problem.y_TO)


def error_in_units(result_TO: torch.Tensor, exact_TO: torch.Tensor) -> float:
    """Relative RMS error, in units of one rounding of the result's type; NaN for a NaN anywhere."""
    relative = (result_TO.double() - exact_TO).square().mean().sqrt() / exact_TO.square().mean().sqrt()
    return float(relative) / (torch.finfo(result_TO.dtype).eps / 2)
