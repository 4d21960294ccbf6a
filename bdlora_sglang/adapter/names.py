"""Names of an adapter's tensors: whatever wrapped the model that was saved, one name for each module, PEFT's own."""

import re
from dataclasses import dataclass
from enum import Enum, auto

# What torch.compile, FSDP and activation checkpointing put into the path of a module.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# What PEFT and DistributedDataParallel put before it; a model that was wrapped twice has them twice.
_PREFIXES = ("base_model.model.", "module.")
# The adapter's own name stands in a state dict in memory ("default"), and not in the files that PEFT saves.
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(?:\.(?P<adapter>[^.]+))?")
# Parts of a LoRA that change what it computes, and which no plain pair of factors stands for.
_UNSUPPORTED = re.compile(r"\.lora_|\.trainable_tokens_|\.token_adapter\.")
# Copies of base weights, which PEFT saves under the name of what holds them.
_SAVED = re.compile(r"\.(?:base_layer|original_module|modules_to_save(?:\.[^.]+)?)(?=\.[^.]+$)")


class TensorKind(Enum):
    """What a tensor of an adapter is."""

    LINEAR = auto()  # lora_A or lora_B of a linear module
    EMBEDDING = auto()  # lora_embedding_A or lora_embedding_B
    UNSUPPORTED = auto()  # another part of LoRA: a magnitude (DoRA), a bias, trained tokens
    PARAMETER = auto()  # anything else: a weight of the base model that was saved along, or none of its


@dataclass(frozen=True)
class TensorName:
    """``name`` is the module's of a factor, and the parameter's own of a `PARAMETER`; ``factor`` is "A", "B" or ""."""

    kind: TensorKind
    name: str
    factor: str = ""


def parse_tensor_name(name: str, has_head: bool) -> TensorName:
    """What the tensor ``name`` is, with the name that its module has in the base model.

    Args:
        name: as it was saved: with PEFT's prefix or without, compiled, wrapped, with the adapter's name or without.
        has_head: the base model is one with a head (``...ForCausalLM``), whose layers are below ``model``. Adapters
            whose names lack that part (``base_model.model.layers.0...``) get it.
    """
    plain = _unwrapped(name)
    match = _LORA.fullmatch(plain.removesuffix(".weight"))
    if (match is not None and plain.endswith(".weight")) or (match is not None and match["embedding"]):
        assert match is not None
        kind = TensorKind.EMBEDDING if match["embedding"] else TensorKind.LINEAR
        return TensorName(kind, _below_head(match["module"], has_head), match["factor"])
    if _UNSUPPORTED.search(plain):
        return TensorName(TensorKind.UNSUPPORTED, plain)
    return TensorName(TensorKind.PARAMETER, _below_head(_SAVED.sub("", plain), has_head))


def peft_tensor_name(module: str, factor: str, is_embedding: bool) -> str:
    """The name under which PEFT saves a factor."""
    return f"base_model.model.{module}.lora_{f'embedding_{factor}' if is_embedding else f'{factor}.weight'}"


def _unwrapped(name: str) -> str:
    plain = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    while prefix := next((p for p in _PREFIXES if plain.startswith(p)), None):
        plain = plain.removeprefix(prefix)
    return plain


def _below_head(module: str, has_head: bool) -> str:
    first, _, rest = module.rpartition("unembed_tokens")
    if module.endswith("unembed_tokens"):  # another name of the output head, which SGLang reads, too
        return f"{first}lm_head{rest}"
    return f"model.{module}" if has_head and module.startswith(("layers.", "embed_tokens")) else module
