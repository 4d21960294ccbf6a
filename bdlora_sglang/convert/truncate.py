"""The best blocks of a smaller rank for one module, by the delta's own error or by the error on the module's outputs.

Without moments every block is on its own, and `lowrank` gives the optimum.

With moments the error is ``E ||(delta - delta') x||^2``, over the module's inputs x. Blocks of a column-parallel module
have outputs of their own, so each is again on its own, and the weighted optimum of `lowrank` is the optimum. Blocks of
a row-parallel module add to the same outputs, so an error of one can make good for an error of another where their
inputs correlate. There we start from the blocks' own optima, or from the unweighted ones if these are better, and then
choose block after block anew as the best given the others (block coordinate descent): the error never rises, so the
result is never worse than the unweighted one on its own moments. Each block stays in the span of its own A, for which
the moments of ``z_k = A_k x_k``, ``(N R, N R)`` for N blocks of rank R, are all that is needed: no module ever needs a
matrix of the size of its inputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bdlora_sglang.adapter import BlockSide
from bdlora_sglang.convert.blocks import Block, with_equal_ranks
from bdlora_sglang.convert.lowrank import (
    BlockSVD,
    Decomposer,
    joint_basis,
    left_svd,
    square_root,
)

# Descent ends when a sweep over the blocks lowers the error by less than this part of it.
_CONVERGED = 1e-4
_MAX_SWEEPS = 20
# Directions of a block's inputs with less than this part of its largest moment do not predict another block's error.
_PREDICTION_CUTOFF = 1e-6


@dataclass(frozen=True)
class Errors:
    """Squared errors and norms of one module's delta, without its scaling; on activations only with moments."""

    error_sq: float
    norm_sq: float
    activation_error_sq: float | None = None
    activation_norm_sq: float | None = None
    uncalibrated_activation_error_sq: float | None = None


def truncate_blocks(
    blocks: Sequence[Block],
    side: BlockSide,
    rank: int,
    moments: torch.Tensor | None = None,
) -> tuple[list[Block], Errors]:
    """The best blocks of rank ``rank`` (of a block, not of all), and their error.

    Args:
        blocks: the module's delta, see `blocks`; float32 or float64. With ``moments``, float64.
        side: which features the blocks divide.
        rank: of each new block; a block of no larger rank stays as good as exact.
        moments: of ``z = A x``, see `moments_shape`; None minimises the Frobenius norm of the delta's error.
    """
    decomposer = Decomposer()
    plain = [decomposer.decompose(block) for block in blocks]
    norm_sq = sum(_norm_sq(svd.singular_values) for svd in plain)
    if moments is None:
        error_sq = sum(_norm_sq(svd.singular_values[rank:]) for svd in plain)
        return [svd.truncate(rank) for svd in plain], Errors(error_sq, norm_sq)
    blocks = with_equal_ranks(blocks)
    if side is BlockSide.A:
        return _truncate_coupled(blocks, decomposer, rank, moments, norm_sq)
    roots = [square_root(moments[k if len(moments) > 1 else 0]) for k in range(len(blocks))]
    calibrated = [decomposer.decompose(block, root) for block, root in zip(blocks, roots, strict=True)]
    plain = [decomposer.decompose(block) for block in blocks]
    errors = Errors(
        error_sq=sum(_norm_sq(svd.left_out(rank, svd.core) @ decomposer.root(svd.a)) for svd in calibrated),
        norm_sq=norm_sq,
        activation_error_sq=sum(_norm_sq(svd.singular_values[rank:]) for svd in calibrated),
        activation_norm_sq=sum(_norm_sq(svd.singular_values) for svd in calibrated),
        uncalibrated_activation_error_sq=sum(
            _norm_sq(svd.left_out(rank, svd.core) @ root) for svd, root in zip(plain, roots, strict=True)
        ),
    )
    return [svd.truncate(rank) for svd in calibrated], errors


def energies(blocks: Sequence[Block], side: BlockSide, moments: torch.Tensor | None = None) -> torch.Tensor:
    """``e[i]``: what rank i adds to the squared norm of the delta, all blocks together, largest first, float64.

    With moments, to the activations; for a row-parallel module as if its blocks' inputs did not correlate.
    """
    decomposer = Decomposer()
    if moments is not None:
        blocks = with_equal_ranks(blocks)
    values = [decomposer.singular_values(b, _own_root(moments, side, k, b.rank)) for k, b in enumerate(blocks)]
    total = torch.zeros(max(len(v) for v in values), dtype=torch.float64)
    for v in values:
        total[: len(v)] += v.double().cpu() ** 2
    return total


def moments_shape(blocks: Sequence[Block], side: BlockSide) -> tuple[int, ...]:
    """The shape of a module's moments ``E[z z^T]``, ``z_k = A_k x_k``; R is the largest rank of a block.

    ``(N R, N R)`` for a row-parallel module of N blocks; ``(N, R, R)`` for a column-parallel one, ``(1, R, R)`` when
    its blocks share one A.
    """
    rank = max(block.rank for block in blocks)
    if side is BlockSide.A:
        return len(blocks) * rank, len(blocks) * rank
    return (1 if blocks_share_a(blocks) else len(blocks)), rank, rank


def blocks_share_a(blocks: Sequence[Block]) -> bool:
    return all(block.a is blocks[0].a for block in blocks)


def _own_root(moments: torch.Tensor | None, side: BlockSide, k: int, rank: int) -> torch.Tensor | None:
    if moments is None:
        return None
    if side is BlockSide.A:
        return square_root(moments[k * rank : (k + 1) * rank, k * rank : (k + 1) * rank])
    return square_root(moments[k if len(moments) > 1 else 0])


def _truncate_coupled(
    blocks: Sequence[Block],
    decomposer: Decomposer,
    rank: int,
    moments: torch.Tensor,
    norm_sq: float,
) -> tuple[list[Block], Errors]:
    q, cores = joint_basis([block.b for block in blocks])
    problem = _Coupled(q, cores, [block.a for block in blocks], moments, rank)
    plain = [problem.cut(k, cores[k], decomposer.root(block.a)) for k, block in enumerate(blocks)]
    separate = [problem.cut(k, cores[k], problem.roots[k]) for k in range(len(blocks))]
    uncalibrated = problem.error_sq(plain)
    svds = problem.descend(min(plain, separate, key=problem.error_sq))
    missing = [svd.left_out(rank, core) for svd, core in zip(svds, cores, strict=True)]
    errors = Errors(
        error_sq=sum(_norm_sq(m @ decomposer.root(b.a)) for m, b in zip(missing, blocks, strict=True)),
        norm_sq=norm_sq,
        activation_error_sq=problem.error_sq(svds),
        activation_norm_sq=problem.weigh(torch.cat(cores, dim=1)),
        uncalibrated_activation_error_sq=uncalibrated,
    )
    return [svd.truncate(rank) for svd in svds], errors


class _Coupled:
    """Row-parallel blocks that add to the same outputs: ``sum_k Q (C_k - W_k) z_k`` is the error, W_k of rank r."""

    def __init__(
        self,
        q: torch.Tensor,
        cores: list[torch.Tensor],
        a: list[torch.Tensor],
        moments: torch.Tensor,
        rank: int,
    ) -> None:
        self.q, self.cores, self.a, self.rank, self.moments = q, cores, a, rank, moments
        size = cores[0].shape[1]
        self.windows = [slice(k * size, (k + 1) * size) for k in range(len(cores))]
        own = [moments[window, window] for window in self.windows]
        self.roots = [square_root(moment) for moment in own]
        self._inverses = [torch.linalg.pinv(moment, rtol=_PREDICTION_CUTOFF, hermitian=True) for moment in own]

    def cut(self, k: int, target: torch.Tensor, root: torch.Tensor) -> BlockSVD:
        """The SVD of block k for the best approximation of ``target`` (q, R) under ``root``."""
        return BlockSVD(self.q, target, self.a[k], *left_svd(target @ root))

    def missing(self, svds: Sequence[BlockSVD]) -> torch.Tensor:
        parts = [svd.left_out(self.rank, core) for svd, core in zip(svds, self.cores, strict=True)]
        return torch.cat(parts, dim=1)

    def weigh(self, matrix: torch.Tensor) -> float:
        return float(((matrix @ self.moments) * matrix).sum().clamp(min=0))

    def error_sq(self, svds: Sequence[BlockSVD]) -> float:
        return self.weigh(self.missing(svds))

    def descend(self, svds: Sequence[BlockSVD]) -> list[BlockSVD]:
        best, best_error = list(svds), self.error_sq(svds)
        for _ in range(_MAX_SWEEPS):
            trial = list(best)
            missing = self.missing(trial)
            for k, window in enumerate(self.windows):
                others = missing @ self.moments[:, window] - missing[:, window] @ self.moments[window, window]
                target = self.cores[k] + others @ self._inverses[k]
                trial[k] = self.cut(k, target, self.roots[k])
                missing[:, window] = trial[k].left_out(self.rank, self.cores[k])
            error = self.error_sq(trial)
            if error >= best_error:  # rounding; in exact arithmetic a sweep never raises the error
                break
            best, gain, best_error = trial, best_error - error, error
            if gain < _CONVERGED * error:
                break
        return best


def _norm_sq(tensor: torch.Tensor) -> float:
    return float(tensor.double().square().sum())
