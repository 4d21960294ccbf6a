"""One adapter, checked: its configuration against the names and shapes of its tensors. No weights are read here."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from bdlora_sglang.adapter.checkpoint import WEIGHTS_NAME, Checkpoint, SafetensorsCheckpoint, TensorCheckpoint
from bdlora_sglang.adapter.config import AdapterConfig, BlockSide
from bdlora_sglang.errors import AdapterError

# `.default` is the adapter name that PEFT's in-memory state dict carries and its saved files do not.
_TENSOR_NAME = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.default)?\.weight$")


@dataclass(frozen=True)
class LoRAModule:
    """LoRA on one linear module, with the names of its two tensors in the checkpoint.

    Stored shapes, with ``n = nblocks``: A is ``(rank, in)``, or ``(rank, in / n)`` when A is block-diagonal; B is
    ``(out, rank)``, or ``(out, rank / n)`` when B is block-diagonal. A plain module has one block.
    """

    name: str
    tensor_a: str
    tensor_b: str
    in_features: int
    out_features: int
    rank: int
    nblocks: int
    side: BlockSide
    scaling: float

    @property
    def block_rank(self) -> int:
        return self.rank // self.nblocks

    @property
    def num_parameters(self) -> int:
        in_per_row = self.in_features // (self.nblocks if self.side is BlockSide.A else 1)
        out_rank = self.rank // (self.nblocks if self.side is BlockSide.B else 1)
        return self.rank * in_per_row + self.out_features * out_rank


@dataclass(frozen=True)
class Adapter:
    """A LoRA or BD-LoRA adapter: its config, its modules by name, and the checkpoint to read factors from."""

    config: AdapterConfig
    modules: Mapping[str, LoRAModule]
    checkpoint: Checkpoint

    @classmethod
    def open(cls, folder: str | Path) -> "Adapter":
        """Open a PEFT adapter folder and check config, tensor names and shapes.

        Raises:
            AdapterError: config or weights are missing, not PEFT's format, of a kind we cannot use, or contradict each
                other.
        """
        folder = Path(folder)
        config = AdapterConfig.from_folder(folder)
        return cls._checked(config, SafetensorsCheckpoint(folder / WEIGHTS_NAME))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], config: Mapping[str, object], name: str) -> "Adapter":
        """The same for tensors in memory, under PEFT's names; ``name`` is what messages call the adapter."""
        return cls._checked(AdapterConfig.from_dict(config, name), TensorCheckpoint(tensors, name))

    @classmethod
    def _checked(cls, config: AdapterConfig, checkpoint: Checkpoint) -> "Adapter":
        pairs = _pair_factors(checkpoint)
        modules = {name: _check_module(name, *pairs[name], config, checkpoint) for name in sorted(pairs)}
        if not modules:
            raise AdapterError(
                checkpoint.source, "adapter weights", "no LoRA tensors", "'<module>.lora_A.weight' and B"
            )
        return cls(config, modules, checkpoint)

    @property
    def nblocks(self) -> int:
        """The block count of the block-diagonal modules; 1 when there are none."""
        return max(module.nblocks for module in self.modules.values())

    @property
    def kind(self) -> str:
        return "BD-LoRA" if any(m.side is not BlockSide.NONE for m in self.modules.values()) else "LoRA"

    @property
    def max_rank(self) -> int:
        """The largest whole rank of any module."""
        return max(module.rank for module in self.modules.values())

    @property
    def num_parameters(self) -> int:
        return sum(module.num_parameters for module in self.modules.values())


def _pair_factors(checkpoint: Checkpoint) -> dict[str, tuple[str, str]]:
    """Tensor names of A and B by module name."""
    factors: dict[str, dict[str, str]] = {}
    for name in sorted(checkpoint.names()):
        match = _TENSOR_NAME.match(name)
        if match is None:
            raise AdapterError(
                checkpoint.source,
                f"tensor '{name}'",
                "a tensor that is not LoRA on a linear module",
                "'<module>.lora_A.weight' or '<module>.lora_B.weight' (no DoRA, embedding, bias or saved modules)",
            )
        previous = factors.setdefault(match["module"], {}).setdefault(match["factor"], name)
        if previous != name:
            raise AdapterError(checkpoint.source, f"tensor '{name}'", f"a duplicate of '{previous}'", "one of them")
    for module, names in factors.items():
        if len(names) != 2:
            missing = "B" if "A" in names else "A"
            raise AdapterError(checkpoint.source, f"module '{module}'", f"no lora_{missing}.weight", "both factors")
    return {module: (names["A"], names["B"]) for module, names in factors.items()}


def _check_module(name: str, tensor_a: str, tensor_b: str, config: AdapterConfig, checkpoint: Checkpoint) -> LoRAModule:
    if not config.targets(name):
        raise AdapterError(
            checkpoint.source,
            f"tensor '{tensor_a}'",
            "LoRA on a module that the config does not target",
            f"a module in target_modules {config.target_modules!r} (and layers_to_transform) of {config.source}",
        )
    side = config.side(name)
    rank = config.rank(name)
    nblocks = 1 if side is BlockSide.NONE or config.bdlora is None else config.bdlora.nblocks
    if rank % nblocks:
        raise AdapterError(
            config.source, f"rank of module '{name}'", rank, f"a multiple of use_bdlora.nblocks = {nblocks}"
        )
    for tensor in (tensor_a, tensor_b):
        checkpoint.dtype(tensor)
    shape_a, shape_b = checkpoint.shape(tensor_a), checkpoint.shape(tensor_b)
    b_rank = rank // nblocks if side is BlockSide.B else rank
    meaning = f"{side.value}, rank {rank}, {nblocks} block{'s' if nblocks > 1 else ''}, by {config.source}"
    if len(shape_a) != 2 or shape_a[0] != rank or shape_a[1] < 1:
        raise AdapterError(checkpoint.source, f"tensor '{tensor_a}' shape", shape_a, f"({rank}, *): {meaning}")
    if len(shape_b) != 2 or shape_b[1] != b_rank or shape_b[0] < 1:
        raise AdapterError(checkpoint.source, f"tensor '{tensor_b}' shape", shape_b, f"(*, {b_rank}): {meaning}")
    if side is BlockSide.B and shape_b[0] % nblocks:
        raise AdapterError(
            checkpoint.source, f"tensor '{tensor_b}' shape", shape_b, f"rows that {nblocks} blocks divide: {meaning}"
        )
    return LoRAModule(
        name=name,
        tensor_a=tensor_a,
        tensor_b=tensor_b,
        in_features=shape_a[1] * (nblocks if side is BlockSide.A else 1),
        out_features=shape_b[0],
        rank=rank,
        nblocks=nblocks,
        side=side,
        scaling=_scaling(name, config),
    )


def _scaling(name: str, config: AdapterConfig) -> float:
    """It is multiplied in float32."""
    scaling = config.scaling(name)
    if abs(scaling) > torch.finfo(torch.float32).max:
        raise AdapterError(
            config.source, f"lora_alpha / r of module '{name}'", scaling, "a number that float32 can hold"
        )
    return scaling
