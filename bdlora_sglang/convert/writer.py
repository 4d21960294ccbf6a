"""A safetensors file, written tensor by tensor: memory for one tensor at a time, and the header last.

Format (https://github.com/huggingface/safetensors#format): 8 bytes of header size, little-endian; the header, JSON,
padded with spaces; the tensors' bytes without gaps. The header says where each tensor lies and carries metadata that
here is known only at the end (the errors), so room is left for it at the beginning.
"""

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch
from typing_extensions import Self

from bdlora_sglang.convert.blocks import raw_bytes

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    # Of weights that were saved along.
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 8
# `os.write` takes at most 2 GiB at once.
_CHUNK_BYTES = 64 << 20


class SafetensorsWriter:
    """Writes ``path``, new tensors of one dtype; use as a context manager, and call `finish` at the end.

    The same tensors in the same order with the same metadata give the same bytes.
    """

    def __init__(self, path: Path, dtype: torch.dtype, header_bytes: int) -> None:
        """Create the file (it must not exist) and leave ``header_bytes`` for the header.

        Raises:
            OSError: the file cannot be created.
        """
        if sys.byteorder != "little":
            raise NotImplementedError("safetensors files are little-endian, this machine is not")
        self.dtype = dtype
        self.bytes_written = 0
        self._header_bytes = -(-(8 + header_bytes) // _ALIGNMENT) * _ALIGNMENT - 8
        self._entries: dict[str, dict[str, object]] = {}
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        os.lseek(self._fd, 8 + self._header_bytes, os.SEEK_SET)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        os.close(self._fd)

    def add(self, name: str, row_chunks: Sequence[torch.Tensor]) -> None:
        """Append the tensor ``torch.cat(row_chunks)``, without making it; chunks are 2-D CPU tensors of our dtype.

        Raises:
            OSError: a full disk, or a file size limit.
        """
        assert name not in self._entries
        begin = self.bytes_written
        for chunk in row_chunks:
            assert chunk.dtype == self.dtype and chunk.shape[1] == row_chunks[0].shape[1]
            self._write(raw_bytes(chunk.contiguous()))
        self._enter(name, self.dtype, (sum(chunk.shape[0] for chunk in row_chunks), row_chunks[0].shape[1]), begin)

    def add_as_it_is(self, name: str, tensor: torch.Tensor) -> None:
        """Append a CPU tensor of any shape and dtype that safetensors has; raises `OSError` like `add`."""
        assert name not in self._entries
        begin = self.bytes_written
        self._write(raw_bytes(tensor.contiguous()))
        self._enter(name, tensor.dtype, tuple(tensor.shape), begin)

    def _enter(self, name: str, dtype: torch.dtype, shape: Sequence[int], begin: int) -> None:
        offsets = [begin, self.bytes_written]
        self._entries[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": offsets}

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the header and wait until everything is on the disk."""
        header = _header(self._entries, metadata)
        assert len(header) <= self._header_bytes, (len(header), self._header_bytes)
        os.lseek(self._fd, 0, os.SEEK_SET)
        self._write(memoryview(self._header_bytes.to_bytes(8, "little") + header.ljust(self._header_bytes)))
        os.fsync(self._fd)

    def _write(self, data: memoryview) -> None:
        while data:
            written = os.write(self._fd, data[:_CHUNK_BYTES])
            self.bytes_written += written
            data = data[written:]


def header_room(names: Iterable[str], largest_metadata: Mapping[str, str]) -> int:
    """A size that the header of these tensors, 4-D at most, cannot exceed; metadata no longer than the largest."""
    largest = 10**15
    worst = {
        "dtype": "F8_E4M3",
        "shape": [largest] * 4,
        "data_offsets": [largest, largest],
    }
    return len(_header(dict.fromkeys(names, worst), largest_metadata))


def _header(entries: Mapping[str, object], metadata: Mapping[str, str]) -> bytes:
    header = {"__metadata__": {"format": "pt", **metadata}, **entries}
    return json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode("ascii")
