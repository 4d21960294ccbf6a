"""LoRA on an embedding, against the dense product of one-hot rows in float64."""

import pytest
import torch

from bdlora_kernels import EagerFactors, UnpackedSlice, add_embedding_delta, group_tokens, pack

HIDDEN = 12


@pytest.mark.parametrize("window", [range(40), range(10, 25), range(39, 40)], ids=str)
@pytest.mark.parametrize("lengths", [[1, 1, 1, 1], [3, 20, 1, 9], [0, 2, 30, 1]], ids=str)
def test_equals_dense(lengths: list[int], window: range) -> None:
    """Slots of several ranks, an empty one, and the base model; a rank's tokens alone."""
    generator = torch.Generator().manual_seed(0)
    factors = EagerFactors.allocate(3, 400, 200, torch.float32, torch.device("cpu"))
    dense = torch.zeros(4, 40, HIDDEN, dtype=torch.float64)  # the last: no slot
    for slot, (rank, scaling) in {0: (3, 2.0), 2: (5, 0.25)}.items():
        a, b = torch.randn(rank, 40, generator=generator), torch.randn(HIDDEN, rank, generator=generator)
        own = a[:, window.start : window.stop].contiguous()
        factors.write(slot, pack([UnpackedSlice(own, b, 0, 0, scaling)]))
        dense[slot, window.start : window.stop] = scaling * own.double().T @ b.double().T
    slots = [2, 0, -1, 1]
    ids = torch.randint(0, 40, (sum(lengths),), generator=generator)
    y = torch.randn(len(ids), HIDDEN, generator=generator)
    slot_of_token = [slot for slot, length in zip(slots, lengths, strict=True) for _ in range(length)]
    expected = y.double() + torch.stack([dense[slot, token] for slot, token in zip(slot_of_token, ids, strict=True)])
    add_embedding_delta(y, ids, window.start, factors, group_tokens(slots, lengths, torch.device("cpu")))
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)
