"""All-reduce, all-gather and broadcast of tensors over a `SharedSegment`.

Every result has the same bits on all ranks, at all times: ranks are added in the order of their numbers, 16-bit types
in float32 and rounded once.
"""

from collections.abc import Callable, Sequence

import torch

from bdlora_sglang.serving.cpu.shared_segment import SharedSegment

# `torch.add`, `torch.maximum` or `torch.minimum`.
Combine = Callable[..., torch.Tensor]
# Publishes the step that this rank has written, and waits for the other ranks.
Exchange = Callable[[], None]
# A region as one tensor (ranks, *shape), and the parts of the ranks.
_View = tuple[torch.Tensor, tuple[torch.Tensor, ...]]

_ROUNDED_DTYPES = (torch.bfloat16, torch.float16)
_MAX_CACHED_VIEWS = 256


def combine_in_order(combine: Combine, parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    """Reduce at least two ``parts`` of one shape into ``out``, from the first to the last."""
    # PyTorch adds two numbers of 16 bits in float32 and rounds the sum, so that two need no detour.
    if len(parts) > 2 and combine is torch.add and out.dtype in _ROUNDED_DTYPES:
        total = parts[0].float()
        for part in parts[1:]:
            total.add_(part)
        out.copy_(total)
        return
    combine(parts[0], parts[1], out=out)
    for part in parts[2:]:
        combine(out, part, out=out)


class SharedCollectives:
    """The collectives, each of which all ranks call with tensors of the same dtype and number of elements.

    ``exchange`` ends a step, as `SharedSegment` describes it. Tensors may have any strides, and are not empty.

    Args:
        one_phase_bytes: an all-reduce whose parts are larger than this, all ranks' together, goes in two phases. In
            one phase every rank adds all parts; in two each adds a share of the elements, and reads the other shares.
    """

    def __init__(self, segment: SharedSegment, exchange: Exchange, one_phase_bytes: int) -> None:
        self._segment = segment
        self._exchange = exchange
        self._one_phase_bytes = min(one_phase_bytes, segment.region_bytes)
        self._views: dict[tuple[torch.Size, torch.dtype], tuple[_View, _View]] = {}
        self._rank, self._size = segment.rank, segment.size

    def all_reduce(self, tensor: torch.Tensor, combine: Combine) -> None:
        """Reduce over the ranks, in place."""
        if tensor.nbytes * self._size <= self._one_phase_bytes:
            self._all_reduce_in_one_phase(tensor, combine)
            return
        flat = tensor.reshape(-1)
        for piece in torch.split(flat, self._elements_of_a_step(tensor.dtype)):
            if piece.nbytes * self._size <= self._one_phase_bytes:
                self._all_reduce_in_one_phase(piece, combine)
            else:
                self._all_reduce_in_two_phases(piece, combine)
        if not tensor.is_contiguous():  # Then flat may be a copy.
            tensor.copy_(flat.view(tensor.shape))

    def all_gather(self, output: torch.Tensor, tensor: torch.Tensor) -> None:
        """Put rank r's ``tensor`` into the r-th of ``output``'s N parts: N times the elements, in any shape."""
        if output.is_contiguous() and output.nbytes <= self._segment.region_bytes:
            whole, parts = self._region(tensor)
            parts[self._rank].copy_(tensor)
            self._exchange()
            output.view(whole.shape).copy_(whole)
            return
        gathered = output.reshape(self._size, -1)
        self.all_gather_into(gathered.unbind(), tensor)
        if not output.is_contiguous():
            output.copy_(gathered.view(output.shape))

    def all_gather_into(self, outputs: Sequence[torch.Tensor], tensor: torch.Tensor) -> None:
        """Put rank r's ``tensor`` into ``outputs[r]``: as many elements each, in any shape."""
        flat = tensor.reshape(-1)
        step = self._elements_of_a_step(tensor.dtype)
        flat_outputs = [output.reshape(-1) for output in outputs]
        for start in range(0, flat.numel(), step):
            piece = flat[start : start + step]
            parts = self._parts(piece)
            parts[self._rank].copy_(piece)
            self._exchange()
            for part, output in zip(parts, flat_outputs, strict=True):
                output[start : start + step].copy_(part)
        for output, flat_output in zip(outputs, flat_outputs, strict=True):
            if not output.is_contiguous():
                output.copy_(flat_output.view(output.shape))

    def broadcast(self, tensor: torch.Tensor, root: int) -> None:
        """Overwrite ``tensor`` with rank ``root``'s."""
        flat = tensor.reshape(-1)
        for piece in torch.split(flat, self._elements_of_a_step(tensor.dtype)):
            part = self._parts(piece)[root]
            if self._rank == root:
                part.copy_(piece)
            self._exchange()
            if self._rank != root:
                piece.copy_(part)
        if not tensor.is_contiguous() and self._rank != root:
            tensor.copy_(flat.view(tensor.shape))

    def _all_reduce_in_one_phase(self, tensor: torch.Tensor, combine: Combine) -> None:
        parts = self._parts(tensor)
        parts[self._rank].copy_(tensor)
        self._exchange()
        combine_in_order(combine, parts, tensor)

    def _all_reduce_in_two_phases(self, flat: torch.Tensor, combine: Combine) -> None:
        parts = self._parts(flat)
        parts[self._rank].copy_(flat)
        self._exchange()
        # The other region, which nobody reads any more.
        total = self._parts(flat)[0]
        start, end = (flat.numel() * rank // self._size for rank in (self._rank, self._rank + 1))
        if start < end:
            combine_in_order(combine, [part[start:end] for part in parts], total[start:end])
        self._exchange()
        flat.copy_(total)

    def _elements_of_a_step(self, dtype: torch.dtype) -> int:
        return self._segment.region_bytes // (self._size * dtype.itemsize)

    def _parts(self, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Every rank's part of the region of the step in progress, each of the shape and dtype of ``like``."""
        return self._region(like)[1]

    def _region(self, like: torch.Tensor) -> _View:
        """The region of the step in progress as one tensor, ranks first, and every rank's part of it."""
        key = (like.shape, like.dtype)
        views = self._views.get(key)
        if views is None:
            # Slicing costs as much as copying 4 KiB, and a model uses few shapes again and again.
            if len(self._views) >= _MAX_CACHED_VIEWS:
                self._views.clear()
            views = self._views[key] = self._make_views(*key)
        return views[self._segment.region]

    def _make_views(self, shape: torch.Size, dtype: torch.dtype) -> tuple[_View, _View]:
        elements = self._size * shape.numel()
        assert elements * dtype.itemsize <= self._segment.region_bytes

        def view(offset: int) -> _View:
            flat = torch.frombuffer(self._segment.memory, dtype=dtype, count=elements, offset=offset)
            whole = flat.view(self._size, *shape)
            return whole, whole.unbind()

        # A tensor that is made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            first, second = (view(offset) for offset in self._segment.region_offsets)
        return first, second
