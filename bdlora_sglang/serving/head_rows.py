"""Which slot each row has that an output head is given: of a prefill just the rows whose logits are wanted."""

from collections.abc import Sequence
from dataclasses import dataclass

from sglang.srt.environ import envs


@dataclass(frozen=True)
class HeadRows:
    """``lengths`` are the rows of each request (SGLang: ``get_lm_head_pruned_lens``); None: those of all its tokens."""

    slots: tuple[int, ...] = ()
    lengths: Sequence[int] | None = None

    def of(self, rows: int, head_pass: int | None) -> tuple[Sequence[int], Sequence[int] | None]:
        """Slots and lengths of ``rows`` rows, all or those of one pass; None for lengths as in the whole batch."""
        if self.lengths is None:
            return self.slots, None
        first = 0 if head_pass is None else head_pass * envs.SGLANG_LOGPROB_CHUNK_SIZE.get()
        lengths, start = [], 0
        for length in self.lengths:
            stop = start + length
            lengths.append(max(0, min(stop, first + rows) - max(start, first)))
            start = stop
        if sum(lengths) != rows:
            raise RuntimeError(f"output head: found {rows} rows from {first} on, expected some of {start}")
        return self.slots, lengths
