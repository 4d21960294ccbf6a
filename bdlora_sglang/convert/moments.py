"""Second moments of what the modules' A sees, kept in a safetensors file that can be used again.

For a module with blocks ``B_k A_k`` they are the mean of ``z z^T`` over tokens, where ``z_k = A_k x_k`` and x_k is what
block k reads of the module's input. That is all the weighted approximation needs (see `truncate`), and for a module
with 28,672 inputs and rank 64 it is a megabyte where the moments of x itself would be three gigabytes. They belong to
one source adapter and one block count, and serve any rank, ratio or error.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from bdlora_sglang.convert.plan import Plan
from bdlora_sglang.convert.writer import SafetensorsWriter, header_room
from bdlora_sglang.errors import AdapterError

_METADATA_KEY = "bdlora_moments"


@dataclass(frozen=True)
class Moments:
    """Moments by module, float64, with the number of tokens they are the mean of.

    Shapes, see `truncate.moments_shape`: ``(N R, N R)`` or ``(N or 1, R, R)``.
    """

    by_module: Mapping[str, torch.Tensor]
    source: str
    nblocks: int
    tokens: int

    def of(self, module: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return self.by_module[module].to(device, dtype)

    def save(self, path: Path) -> None:
        """Write a safetensors file, replacing an old one in one step; the same moments give the same bytes."""
        record = json.dumps(
            {"source": self.source, "nblocks": self.nblocks, "tokens": self.tokens},
            sort_keys=True,
        )
        metadata = {
            _METADATA_KEY: record,
            **{f"shape.{name}": json.dumps(list(m.shape)) for name, m in self.by_module.items()},
        }
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            with SafetensorsWriter(partial, torch.float64, header_room(self.by_module, metadata)) as writer:
                for name, moments in sorted(self.by_module.items()):
                    writer.add(name, [moments.flatten(0, -2)])
                writer.finish(metadata)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path, plan: Plan) -> "Moments":
        """Read a file that `save` wrote.

        Raises:
            AdapterError: it is missing or damaged, or was collected for another adapter or block count.
        """
        if not path.is_file():
            raise AdapterError(
                str(path),
                "moments",
                "no such file",
                "a file that --moments saved, or --calibrate",
            )
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                record = json.loads(metadata[_METADATA_KEY])
                names = list(file.keys())
                tensors = {n: file.get_tensor(n).reshape(json.loads(metadata[f"shape.{n}"])) for n in names}
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise AdapterError(str(path), "moments", str(error), "a file that --moments saved") from error
        wanted = {"source": adapter_digest(plan), "nblocks": plan.nblocks}
        for key, value in wanted.items():
            if record[key] != value:
                raise AdapterError(str(path), f"moments of {key}", record[key], value)
        missing = next(
            (module.name for module in plan.converted if module.name not in tensors),
            None,
        )
        if missing is not None:
            raise AdapterError(
                str(path),
                f"moments of module '{missing}'",
                "none",
                "moments of every module with a side",
            )
        return cls(tensors, record["source"], record["nblocks"], record["tokens"])


def adapter_digest(plan: Plan) -> str:
    """What moments know their adapter by: a SHA-256 of its weights file and of the modules' sides."""
    digest = hashlib.sha256(json.dumps({name: side.name for name, side in plan.sides.items()}, sort_keys=True).encode())
    with Path(plan.adapter.checkpoint.source).open("rb") as file:
        while chunk := file.read(16 << 20):
            digest.update(chunk)
    return digest.hexdigest()
