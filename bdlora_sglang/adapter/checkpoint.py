"""Where an adapter's tensors come from: a safetensors file read slice by slice, or tensors already in memory."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from bdlora_sglang.errors import AdapterError

WEIGHTS_NAME = "adapter_model.safetensors"

# Files that hold weights as pickles. They run code when they are loaded, so they are refused and never opened.
_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}

# Pages that were read stay resident until the file is unmapped. A fresh map after this many bytes bounds the memory
# that reading a whole adapter takes, at the price of parsing the header again.
_REMAP_BYTES = 16 << 20

_SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Checkpoint(Protocol):
    """Named 2-D tensors of which any rectangle can be read. ``bytes_read`` counts the bytes handed out so far."""

    source: str
    bytes_read: int

    def names(self) -> Iterable[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, rows: range, columns: range) -> torch.Tensor:
        """Copy ``tensor[rows, columns]`` (ranges of step 1); raises `AdapterError` on NaN and infinity."""
        ...


class SafetensorsCheckpoint:
    """``adapter_model.safetensors``. Only the header is read at first, and of each tensor only what is asked for."""

    def __init__(self, path: Path) -> None:
        """Open the file; raises `AdapterError` when it is missing, truncated, corrupt, or a pickle in its place."""
        self.source = str(path)
        self.bytes_read = 0
        if not path.is_file():
            pickles = sorted(p.name for p in path.parent.glob("*") if p.suffix in _PICKLE_SUFFIXES)
            if pickles:
                raise AdapterError(
                    str(path.parent / pickles[0]), "adapter weights", "a pickle", f"{WEIGHTS_NAME}: pickles are refused"
                )
            raise AdapterError(self.source, "adapter weights", "no such file", "a safetensors file")
        self._slices: dict[str, Any] = {}
        self._map()

    def _map(self) -> None:
        try:
            file: Any = safe_open(self.source, framework="pt")
        except (SafetensorError, OSError) as error:
            raise AdapterError(self.source, "adapter weights", str(error), "a whole safetensors file") from error
        self._slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # not a dict
        self._mapped_at = self.bytes_read
        self._identity = _identity(self.source)

    def names(self) -> Iterable[str]:
        return self._slices.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slices[name].get_shape())

    def dtype(self, name: str) -> torch.dtype:
        dtype = self._slices[name].get_dtype()
        if dtype not in _SAFETENSORS_DTYPES:
            raise AdapterError(self.source, f"tensor '{name}' dtype", dtype, "F32, BF16, F16 or F64")
        return _SAFETENSORS_DTYPES[dtype]

    def read(self, name: str, rows: range, columns: range) -> torch.Tensor:
        try:
            view = self._slices[name][rows.start : rows.stop, columns.start : columns.stop]
        except (SafetensorError, OSError) as error:
            raise AdapterError(self.source, f"tensor '{name}'", str(error), "readable data") from error
        # A clone, because the view keeps the whole file mapped.
        tensor = view.clone(memory_format=torch.contiguous_format)
        del view
        # A file that was put in its place in the meantime is another one: the old map goes on showing ours.
        if self.bytes_read - self._mapped_at > _REMAP_BYTES and _identity(self.source) == self._identity:
            self._map()
        return _checked(self, name, tensor)


class TensorCheckpoint:
    """Tensors that were handed over, for example through SGLang's ``/load_lora_adapter_from_tensors``."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], source: str) -> None:
        self.source = source
        self.bytes_read = 0
        self._tensors = tensors

    def names(self) -> Iterable[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        dtype = self._tensors[name].dtype
        if dtype not in _SAFETENSORS_DTYPES.values():
            raise AdapterError(self.source, f"tensor '{name}' dtype", dtype, "float32, bfloat16, float16 or float64")
        return dtype

    def read(self, name: str, rows: range, columns: range) -> torch.Tensor:
        view = self._tensors[name][rows.start : rows.stop, columns.start : columns.stop]
        return _checked(self, name, view.detach().cpu().clone(memory_format=torch.contiguous_format))


def _identity(path: str) -> tuple[int, ...] | None:
    try:
        status = Path(path).stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _checked(checkpoint: Checkpoint, name: str, tensor: torch.Tensor) -> torch.Tensor:
    checkpoint.bytes_read += tensor.numel() * tensor.element_size()
    # NaN passes through both; some ten times faster than asking every value.
    if tensor.numel() and not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise AdapterError(checkpoint.source, f"tensor '{name}'", f"{bad} NaN or infinite values", "finite values")
    return tensor
