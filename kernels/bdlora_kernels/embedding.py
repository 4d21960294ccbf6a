"""LoRA on an embedding: A is looked up, not multiplied with. In plain PyTorch.

Shape suffixes: T tokens, K tokens of one slot, O outputs, R rank, V tokens of the vocabulary that this rank holds, W
columns of the shrink output.
"""

from collections.abc import Iterator

import torch

from bdlora_kernels.eager import EagerFactors, expand, shrink_width
from bdlora_kernels.segments import TokenBatch


def add_embedding_delta(
    y_TO: torch.Tensor, ids_T: torch.Tensor, first_id: int, factors: EagerFactors, batch: TokenBatch
) -> None:
    """``y[t] += scaling * A[:, ids[t] - first_id] @ B.T`` in place, for each token t whose slot holds something here.

    Tokens outside of ``first_id, ..., first_id + V - 1`` get nothing: they are another rank's.
    """
    width = shrink_width(factors, batch)
    if not width:
        return
    h_TW = torch.zeros(len(ids_T), width, dtype=torch.float32, device=ids_T.device)
    for slot, tokens in _tokens_by_slot(batch):
        for part in factors.slices[slot]:  # one: an embedding has one block
            columns_K = ids_T[tokens].long() - first_id
            own_K = (columns_K >= 0) & (columns_K < part.input_size)
            a_RV = factors.a(slot, part)
            h_KR = a_RV[:, columns_K.clamp(0, part.input_size - 1)].T.float() * own_K[:, None]
            h_TW[tokens, : part.rank] = h_KR
    expand(y_TO, h_TW[None], factors, batch)


def _tokens_by_slot(batch: TokenBatch) -> Iterator[tuple[int, slice | torch.Tensor]]:
    for slot, start, stop in batch.few.tolist():
        yield slot, torch.from_numpy(batch.places[start:stop])
    for segment in batch.many:
        yield segment.slot, segment.tokens
