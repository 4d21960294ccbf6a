"""Where an adapter's tensors come from: safetensors files read slice by slice, or tensors already in memory."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from bdlora_sglang.adapter.json_file import read_json
from bdlora_sglang.errors import AdapterError

WEIGHTS_NAME = "adapter_model.safetensors"
# Beside it, large adapters may be in several files, with an index of which tensor is where.
INDEX_NAME = "adapter_model.safetensors.index.json"
WEIGHTS_PATTERNS = ("adapter_model*.safetensors", INDEX_NAME)

# Files that hold weights as pickles. They run code when they are loaded, so they are refused and never opened.
_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}

# Pages that were read stay resident until the file is unmapped. A fresh map after this many bytes bounds the memory
# that reading a whole adapter takes, at the price of parsing the header again.
_REMAP_BYTES = 16 << 20

# An expert's gate, up and down projections have columns in three blocks of rows.
_MOST_KEPT = 3

_SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Checkpoint(Protocol):
    """Named tensors. Of 2-D ones any rectangle can be read; ``bytes_read`` counts the bytes handed out so far."""

    source: str

    @property
    def bytes_read(self) -> int: ...

    def names(self) -> Iterable[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, rows: range, columns: range) -> torch.Tensor:
        """Copy ``tensor[rows, columns]``, rows of step 1; raises `AdapterError` on NaN and infinity."""
        ...

    def read_whole(self, name: str) -> torch.Tensor:
        """Copy a tensor of any shape, values unchecked."""
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
        self._kept: dict[tuple[str, range], torch.Tensor] = {}
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
        if columns.step != 1:
            return self._rows_kept(name, rows)[:, columns.start : columns.stop : columns.step].contiguous()
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

    def _rows_kept(self, name: str, rows: range) -> torch.Tensor:
        """Whole rows, kept for the next calls: those of experts ask for other columns of the same rows."""
        if (name, rows) not in self._kept:
            if len(self._kept) == _MOST_KEPT:
                self._kept.pop(next(iter(self._kept)))
            self._kept[name, rows] = self.read(name, rows, range(self.shape(name)[1]))
        return self._kept[name, rows]

    def read_whole(self, name: str) -> torch.Tensor:
        whole: torch.Tensor = self._slices[name][...].clone()
        return whole


class ShardedCheckpoint:
    """Several safetensors files beside each other, and the index that says which tensor is in which."""

    def __init__(self, index: Path) -> None:
        """Open all files; raises `AdapterError` for an index that is none, or that the files do not agree with."""
        self.source = str(index)
        content = read_json(index, "index of the adapter weights")
        weight_map = content.get("weight_map") if isinstance(content, Mapping) else None
        if not isinstance(weight_map, Mapping) or not all(_is_file_name(file) for file in weight_map.values()):
            expected = "'weight_map': names of tensors, each with the name of a safetensors file beside the index"
            raise AdapterError(self.source, "index of the adapter weights", "no such map", expected)
        self._files = {file: SafetensorsCheckpoint(index.parent / file) for file in sorted(set(weight_map.values()))}
        self._file_of: dict[str, SafetensorsCheckpoint] = {}
        for file, checkpoint in self._files.items():
            for name in checkpoint.names():
                if weight_map.get(name) != file:
                    found, expected = f"it in {file}", f"it in {weight_map.get(name)}, as the index says"
                    raise AdapterError(self.source, f"tensor '{name}'", found, expected)
                self._file_of[name] = checkpoint
        if missing := sorted(set(weight_map) - set(self._file_of)):
            expected = f"it in {weight_map[missing[0]]}, as the index says"
            raise AdapterError(self.source, f"tensor '{missing[0]}'", "no such tensor", expected)

    @property
    def bytes_read(self) -> int:
        return sum(checkpoint.bytes_read for checkpoint in self._files.values())

    def names(self) -> Iterable[str]:
        return self._file_of.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file_of[name].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._file_of[name].dtype(name)

    def read(self, name: str, rows: range, columns: range) -> torch.Tensor:
        return self._file_of[name].read(name, rows, columns)

    def read_whole(self, name: str) -> torch.Tensor:
        return self._file_of[name].read_whole(name)


def _is_file_name(file: object) -> bool:
    return isinstance(file, str) and Path(file).name == file and file.endswith(".safetensors")


def open_checkpoint(folder: Path) -> Checkpoint:
    """The weights of an adapter folder; raises `AdapterError` when there are none, or pickles."""
    if not (folder / WEIGHTS_NAME).exists() and (folder / INDEX_NAME).is_file():
        return ShardedCheckpoint(folder / INDEX_NAME)
    return SafetensorsCheckpoint(folder / WEIGHTS_NAME)


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
        view = self._tensors[name][rows.start : rows.stop, columns.start : columns.stop : columns.step]
        return _checked(self, name, view.detach().cpu().clone(memory_format=torch.contiguous_format))

    def read_whole(self, name: str) -> torch.Tensor:
        return self._tensors[name].detach().cpu().clone(memory_format=torch.contiguous_format)


def _identity(path: str) -> tuple[int, ...] | None:
    try:
        status = Path(path).stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite. Some fifteen times faster than asking each: NaN passes through both ends."""
    return not tensor.numel() or all(math.isfinite(end.item()) for end in torch.aminmax(tensor))


def _checked(checkpoint: "SafetensorsCheckpoint | TensorCheckpoint", name: str, tensor: torch.Tensor) -> torch.Tensor:
    checkpoint.bytes_read += tensor.numel() * tensor.element_size()
    if not all_finite(tensor):
        bad = int((~torch.isfinite(tensor)).sum())
        raise AdapterError(checkpoint.source, f"tensor '{name}'", f"{bad} NaN or infinite values", "finite values")
    return tensor
