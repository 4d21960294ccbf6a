"""Which modules of the base model adapters may target, and which part of each a layer of this rank holds."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from sglang.srt.layers.linear import ColumnParallelLinear, LinearBase, ReplicatedLinear, RowParallelLinear
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding

from bdlora_sglang.serving.module_parts import (
    ServedModule,
    as_one_module,
    column_parallel_parts,
    expert_parts,
    replicated_part,
    row_parallel_part,
    unpadded_sizes,
    vocabulary_part,
    why_experts_are_not_served,
)

# The PEFT modules that SGLang fuses into one layer, in the order of the layer's output. Models that have the fused
# module themselves (Phi-3) have its outputs in the same order.
FUSED_MODULES: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}

VOCABULARY = ("embed_tokens", "lm_head")

# What contains the language model, under names that differ between SGLang, releases of transformers and model classes.
_AROUND_THE_LANGUAGE_MODEL = ("model", "language_model")
# Of Mixtral in SGLang and in older releases of transformers; the values are those of all other models.
_MIXTRAL_MLP = ".block_sparse_moe."
_MIXTRAL_EXPERTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
# Linear modules that choose experts.
_ROUTERS = ("gate", "router")
# Heads that guess further tokens: transformers has none, so PEFT ignores adapters for them.
_MULTI_TOKEN_PREDICTION = ("mtp", "nextn")
_OTHER_MODALITIES = ("vision_config", "audio_config", "speech_config", "image_config")


@dataclass
class ServedModules:
    """All modules of a base model, by `module_key`.

    Attributes:
        parts: those that are served; of a module that SGLang computes in several places of a layer, each of them.
        experts: SGLang's module by layer, for the layers that are one product of one of its experts.
        refused: those that are not, each with the reason.
        roots: the first parts of the keys of everything in the base model.
        is_text_only: the base model knows no other input than text.
    """

    parts: dict[str, tuple[ServedModule, ...]] = field(default_factory=dict)
    experts: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    roots: set[str] = field(default_factory=set)
    is_text_only: bool = True

    @property
    def layers(self) -> set[str]:
        """Names of the SGLang layers that compute them."""
        return {part.layer for parts in self.parts.values() for part in parts}

    def reason(self, key: str) -> str | None:
        """Why a module is not served, where the base model has it; None where it has none of that name."""
        for part in (key, key.rpartition(".")[0]):  # of a group of modules, the group
            if part in self.refused:
                return self.refused[part]
        experts, found, _ = key.partition(".experts.")
        return self.refused.get(f"{experts}.experts") if found else None

    def is_foreign(self, key: str) -> bool:
        """Whether the base model has nothing of the kind, so that PEFT ignores an adapter's weights for it."""
        root = key.partition(".")[0]
        if root in self.roots:
            return False
        return self.is_text_only or root.startswith(_MULTI_TOKEN_PREDICTION)

    def _add(self, key: str, parts: tuple[ServedModule, ...]) -> None:
        if key in self.parts or key in self.refused:
            layers = {part.layer for part in (*self.parts.pop(key, ()), *parts)}
            self.refused[key] = f"it may be one of {', '.join(sorted(layers))}"
        else:
            self.parts[key] = parts


def served_modules(
    base_model: torch.nn.Module,
    hf_config: object,
    refused: Mapping[str, str] = MappingProxyType({}),
    no_experts: str | None = None,
) -> ServedModules:
    """The modules that adapters may target.

    Args:
        base_model: SGLang's, not wrapped yet.
        hf_config: the whole config, not just that of the language model.
        refused: keys of modules that shall not be served, each with the reason.
        no_experts: why experts of MoE layers and what chooses them are not served, where they are not.
    """
    unpadded = unpadded_sizes(hf_config)
    # Multimodal models say which of their layers take LoRA; what they say of embeddings and heads is another's matter.
    takes_lora = getattr(base_model, "should_apply_lora", lambda name: True)
    served = ServedModules(is_text_only=not any(getattr(hf_config, name, None) for name in _OTHER_MODALITIES))
    # Tied embeddings have two names.
    for name, layer in base_model.named_modules(remove_duplicate=False):
        key = module_key(name)
        served.roots.add(key.partition(".")[0])
        if key in refused:
            served.refused[key] = refused[key]
        elif isinstance(layer, VocabParallelEmbedding):
            if key in VOCABULARY:
                served._add(key, (vocabulary_part(name, layer, is_head=key == "lm_head"),))
        elif isinstance(layer, ReplicatedLinear) and key.rpartition(".")[2] in _ROUTERS and no_experts is None:
            served._add(key, (replicated_part(name, layer),))
        elif (reason := _not_served(name, layer, no_experts)) is not None:
            served.refused[key] = reason
        elif isinstance(layer, FusedMoE):
            for projection, parts in expert_parts(name, layer, unpadded):
                served._add(f"{key}.{projection}", parts)
                served.experts.update((part.layer, name) for part in parts)
        elif isinstance(layer, LinearBase) and not takes_lora(name):
            served.refused[key] = "SGLang's model takes LoRA on its language model alone"
        elif isinstance(layer, RowParallelLinear):
            served._add(key, (row_parallel_part(name, layer, unpadded),))
        elif isinstance(layer, ColumnParallelLinear):
            parent, _, leaf = key.rpartition(".")
            outputs = list(column_parallel_parts(name, layer, unpadded))
            if leaf in FUSED_MODULES:
                for module, part in zip(FUSED_MODULES[leaf], outputs, strict=False):
                    served._add(f"{parent}.{module}" if parent else module, (part,))
                served._add(key, tuple(as_one_module(outputs)))
            elif len(outputs) == 1:
                served._add(key, (outputs[0],))
            else:
                served.refused[key] = f"SGLang computes it with others in one {type(layer).__name__}"
    return served


def module_key(name: str) -> str:
    """The name of a module without what contains the language model: the same for SGLang's names and an adapter's.

    All else of the path stays: an encoder's layer is not the decoder's of the same number.
    """
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in _AROUND_THE_LANGUAGE_MODEL:
        del parts[0]
    if "experts" in parts:
        parts[-1] = _MIXTRAL_EXPERTS.get(parts[-1], parts[-1])
    return ".".join(parts).replace(_MIXTRAL_MLP, ".mlp.")


def layer_kind(layer: str) -> str:
    """``qkv_proj`` of an SGLang layer, ``experts.down_proj`` of one of an expert's."""
    leaf = layer.rpartition(".")[2]
    return f"experts.{leaf}" if ".experts." in layer else leaf


def _not_served(name: str, layer: torch.nn.Module, no_experts: str | None) -> str | None:
    if isinstance(layer, FusedMoE):
        return no_experts or why_experts_are_not_served(layer)
    if not isinstance(layer, LinearBase):
        return None
    if name.rpartition(".")[2] == "kv_b_proj":
        return "attention absorbs kv_b_proj (MLA) and never computes it in decode"
    if not isinstance(layer, ColumnParallelLinear | RowParallelLinear):
        return f"LoRA on a {type(layer).__name__} is not supported"
    return None
