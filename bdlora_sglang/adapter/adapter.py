"""One adapter, checked: its configuration against the names and shapes of its tensors. No weights are read here."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from bdlora_sglang.adapter.checkpoint import Checkpoint, TensorCheckpoint, open_checkpoint
from bdlora_sglang.adapter.config import AdapterConfig, BlockSide
from bdlora_sglang.adapter.parameters import EXPERT_PARAMETERS
from bdlora_sglang.adapter.tensors import Tensors
from bdlora_sglang.errors import AdapterError

# Few bytes can stand for many experts; the largest models have some 50 000 projections of experts.
_MOST_MODULES = 1 << 18


@dataclass(frozen=True)
class LoRAModule:
    """LoRA on one linear module or embedding, with the names of its two tensors in the checkpoint.

    Stored shapes, with ``n = nblocks``: A is ``(rank, in)``, or ``(rank, in / n)`` when A is block-diagonal; B is
    ``(out, rank)``, or ``(out, rank / n)`` when B is block-diagonal. A plain module has one block. An embedding is a
    plain module whose inputs are the tokens of the vocabulary. One of the ``experts`` that a parameter holds is a plain
    module whose A and B are parts of the tensors (`bdlora_sglang.adapter.parameters`).
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
    is_embedding: bool = False
    expert: int = 0
    experts: int = 1

    def a_rows(self, ranks: range) -> range:
        """Where A has these ranks of the module."""
        first = self.expert * self.rank
        return range(first + ranks.start, first + ranks.stop)

    def b_columns(self, ranks: range) -> range:
        """Where B has them."""
        return range(self.expert + ranks.start * self.experts, self.expert + ranks.stop * self.experts, self.experts)

    @property
    def is_head(self) -> bool:
        """Whether this is the output head."""
        return self.name.rpartition(".")[2] == "lm_head"

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
    """A LoRA or BD-LoRA adapter: its config, its modules by name, and the checkpoint to read factors from.

    Attributes:
        saved: tensors that are no LoRA, by the name of the base model's parameter that they stand for: PEFT puts them
            in its place, where the base model has one. Whoever computes with the adapter must see to them.
        ignored: tensors that PEFT does not use, each with the reason.
    """

    config: AdapterConfig
    modules: Mapping[str, LoRAModule]
    checkpoint: Checkpoint
    saved: Mapping[str, str] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: str | Path, model_type: str | None = None) -> "Adapter":
        """Open a PEFT adapter folder and check config, tensor names and shapes.

        ``model_type`` is that of the base model, where it is known, for configs that name no target modules.

        Raises:
            AdapterError: config or weights are missing, not PEFT's format, of a kind we cannot use, or contradict each
                other.
        """
        folder = Path(folder)
        config = AdapterConfig.from_folder(folder, model_type)
        return cls._checked(config, open_checkpoint(folder))

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, torch.Tensor],
        config: Mapping[str, object],
        name: str,
        model_type: str | None = None,
    ) -> "Adapter":
        """The same for tensors in memory, under PEFT's names; ``name`` is what messages call the adapter."""
        return cls._checked(AdapterConfig.from_dict(config, name, model_type), TensorCheckpoint(tensors, name))

    @classmethod
    def _checked(cls, config: AdapterConfig, checkpoint: Checkpoint) -> "Adapter":
        tensors = Tensors.sorted_out(checkpoint, config)
        modules: dict[str, LoRAModule] = {}
        for name, pair in sorted(tensors.pairs.items()):
            if name in tensors.parameters:
                modules |= _check_parameter(tensors.parameters[name], *pair, config, checkpoint)
            else:
                modules[name] = _check_module(name, *pair, name in tensors.embeddings, config, checkpoint)
            if len(modules) > _MOST_MODULES:
                raise AdapterError(checkpoint.source, "modules", "too many", f"at most {_MOST_MODULES}")
        if not modules:
            found = _listed("no LoRA tensors", tensors.ignored)
            raise AdapterError(checkpoint.source, "adapter weights", found, "'<module>.lora_A.weight' and B")
        if config.raw.get("ensure_weight_tying") and any(m.is_embedding or m.is_head for m in modules.values()):
            raise AdapterError(config.source, "field 'ensure_weight_tying'", True, "false: not supported")
        if config.bdlora is not None and (embedding := next((m for m in modules.values() if m.is_embedding), None)):
            raise AdapterError(
                config.source,
                "field 'use_bdlora'",
                f"LoRA on the embedding '{embedding.name}'",
                "none: PEFT has no such",
            )
        return cls(config, modules, checkpoint, tensors.saved, tensors.ignored)

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


def _listed(what: str, tensors: Iterable[str]) -> str:
    names = list(tensors)
    return f"{what}, only {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}" if names else what


def _check_module(
    name: str, tensor_a: str, tensor_b: str, is_embedding: bool, config: AdapterConfig, checkpoint: Checkpoint
) -> LoRAModule:
    side = BlockSide.NONE if is_embedding else config.side(name)
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
        is_embedding=is_embedding,
    )


def _check_parameter(
    parameter: str, tensor_a: str, tensor_b: str, config: AdapterConfig, checkpoint: Checkpoint
) -> dict[str, LoRAModule]:
    """LoRA on a parameter: that of a linear module, or one for each expert, by the names of their modules."""
    holder, _, name = parameter.rpartition(".")
    rank = config.rank(parameter)
    for tensor in (tensor_a, tensor_b):
        checkpoint.dtype(tensor)
    shape_a, shape_b = checkpoint.shape(tensor_a), checkpoint.shape(tensor_b)
    holds_experts = name in EXPERT_PARAMETERS
    meaning = f"rank {rank}{' of each expert' if holds_experts else ''}, by {config.source}"
    experts = shape_a[0] // rank if holds_experts and shape_a else 1
    if len(shape_a) != 2 or shape_a[0] != rank * max(experts, 1) or shape_a[1] < 1:
        expected = f"({'a multiple of ' if holds_experts else ''}{rank}, *): {meaning}"
        raise AdapterError(checkpoint.source, f"tensor '{tensor_a}' shape", shape_a, expected)
    if len(shape_b) != 2 or shape_b[1] != shape_a[0] or shape_b[0] < 1:
        raise AdapterError(checkpoint.source, f"tensor '{tensor_b}' shape", shape_b, f"(*, {shape_a[0]}): {meaning}")
    if experts > _MOST_MODULES:
        raise AdapterError(checkpoint.source, f"tensor '{tensor_a}'", f"{experts} experts", f"at most {_MOST_MODULES}")
    module = LoRAModule(
        name=holder,
        tensor_a=tensor_a,
        tensor_b=tensor_b,
        in_features=shape_a[1],
        out_features=shape_b[0],
        rank=rank,
        nblocks=1,
        side=BlockSide.NONE,
        scaling=_scaling(parameter, config),
    )
    if not holds_experts:
        return {holder: module}
    names = [f"{holder}.{expert}.{name}" for expert in range(experts)]
    return {name: replace(module, name=name, expert=e, experts=experts) for e, name in enumerate(names)}


def _scaling(name: str, config: AdapterConfig) -> float:
    """It is multiplied in float32."""
    scaling = config.scaling(name)
    if abs(scaling) > torch.finfo(torch.float32).max:
        raise AdapterError(
            config.source, f"lora_alpha / r of module '{name}'", scaling, "a number that float32 can hold"
        )
    return scaling
