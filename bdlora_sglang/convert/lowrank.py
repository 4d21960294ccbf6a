"""The best approximation of a block's delta by a smaller rank, from its thin factors alone.

Shapes: p outputs, n inputs, R rank before, r rank after; q = min(p, R).

A block's delta is ``B A``, B ``(p, R)``, A ``(R, n)``. Let ``B = Q C`` be a QR decomposition and ``L L^T = A M A^T``,
(R, R), where M is the second moment ``E[x x^T]`` of the block's input, or the identity. With the SVD ``C L = U S V^T``,
the matrix ``Q U_r (U_r^T C) A`` is the rank-r matrix D that minimises ``||(B A - D) M^(1/2)||_F`` (Eckart-Young), and
the error is the tail of S. For ``M = I``, L is the R factor of a QR of ``A^T``: two QRs and an SVD of at most R x R.
Projecting from the left needs no inverse of M, so moments may be singular (fewer tokens than features).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bdlora_sglang.convert.blocks import Block


@dataclass(frozen=True)
class BlockSVD:
    """A block ready to be cut: ``delta = q @ core @ a``, and ``u`` and ``singular_values`` those of ``core @ L``.

    ``q`` is ``(p, q)`` with orthonormal columns, ``core`` ``(q, R)``, ``a`` ``(R, n)``, ``u`` ``(q, k)``, best first.
    """

    q: torch.Tensor
    core: torch.Tensor
    a: torch.Tensor
    u: torch.Tensor
    singular_values: torch.Tensor

    def truncate(self, rank: int) -> Block:
        """The best block of at most ``rank``, both factors with the same norm in every rank."""
        u = self.u[:, :rank]
        a = u.T @ self.core @ self.a
        norm = torch.linalg.vector_norm(a, dim=1)
        balance = torch.where(norm > 0, norm, 1).sqrt()
        return Block((self.q @ u) * balance, a / balance[:, None])

    def left_out(self, rank: int, target: torch.Tensor) -> torch.Tensor:
        """``target - U_r U_r^T core``: what `truncate` misses of ``target`` (q, R), in coordinates of q and a."""
        u = self.u[:, :rank]
        return target - u @ (u.T @ self.core)


class Decomposer:
    """Decomposes the blocks of one module. A factor that blocks share is decomposed once."""

    def __init__(self) -> None:
        self._qr: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        self._roots: dict[tuple[int, ...], torch.Tensor] = {}

    def root(self, a: torch.Tensor) -> torch.Tensor:
        """L with ``L L^T = A A^T``, (R, min(R, n))."""
        key = _identity(a)
        if key not in self._roots:
            self._roots[key] = _triangle(a.T).T
        return self._roots[key]

    def qr(self, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key = _identity(b)
        if key not in self._qr:
            self._qr[key] = tuple(torch.linalg.qr(b))
        return self._qr[key]

    def decompose(self, block: Block, root: torch.Tensor | None = None) -> BlockSVD:
        """Ready to be cut, with the error weighted by ``root`` (R, k), or not weighted."""
        q, core = self.qr(block.b)
        return BlockSVD(
            q,
            core,
            block.a,
            *left_svd(core @ (self.root(block.a) if root is None else root)),
        )

    def singular_values(self, block: Block, root: torch.Tensor | None = None) -> torch.Tensor:
        """The (weighted) singular values of the block's delta, largest first, without its singular vectors."""
        product = _triangle(block.b) @ (self.root(block.a) if root is None else root)
        values: torch.Tensor = torch.linalg.svdvals(product)
        return values


def _triangle(matrix: torch.Tensor) -> torch.Tensor:
    """The R of a QR decomposition."""
    r: torch.Tensor = torch.linalg.qr(matrix, mode="r").R
    return r


def left_svd(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Left singular vectors and singular values, largest first.

    The largest entry of each vector is positive: the signs that LAPACK gives are arbitrary.
    """
    u, singular_values, _ = torch.linalg.svd(matrix, full_matrices=False)
    largest = u.gather(0, u.abs().argmax(dim=0, keepdim=True))
    return u * torch.where(largest < 0, -1, 1), singular_values


def square_root(moments: torch.Tensor) -> torch.Tensor:
    """L with ``L L^T = moments``, positive semidefinite; eigenvalues that rounding made negative count as 0."""
    values, vectors = torch.linalg.eigh(moments)
    root: torch.Tensor = vectors * values.clamp(min=0).sqrt()
    return root


def product_norm_sq(b: torch.Tensor, a: torch.Tensor) -> float:
    """``||b @ a||_F^2`` from two Gram matrices, never the product itself."""
    return float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0))


def rounding_error_sq(exact: Block, stored: Block) -> float:
    """The squared error that rounding the factors adds to the delta, from the differences of the factors."""
    rounded_b, rounded_a = stored.b.to(exact.b), stored.a.to(exact.a)
    b = torch.cat([rounded_b - exact.b, rounded_b], dim=1)
    a = torch.cat([exact.a, rounded_a - exact.a], dim=0)
    return product_norm_sq(b, a)


def joint_basis(bs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """One orthonormal basis for the columns of several ``b`` (p, R_k): Q (p, q) and the coordinates (q, R_k)."""
    if all(_identity(b) == _identity(bs[0]) for b in bs):
        q, core = torch.linalg.qr(bs[0])
        return q, [core] * len(bs)
    q, cores = torch.linalg.qr(torch.cat(list(bs), dim=1))
    return q, list(cores.split([b.shape[1] for b in bs], dim=1))


def _identity(tensor: torch.Tensor) -> tuple[int, ...]:
    return tensor.data_ptr(), *tensor.shape, *tensor.stride()
