"""Weights that were saved along with an adapter: those of the base model do no harm, others would be lost."""

import logging
from collections.abc import Mapping
from typing import Any

import torch

from bdlora_sglang.adapter import Adapter
from bdlora_sglang.adapter.tensors import refuse_ignored, tensors_subject
from bdlora_sglang.errors import AdapterError
from bdlora_sglang.serving.module_parts import ServedModule
from bdlora_sglang.serving.served_modules import ServedModules, module_key

logger = logging.getLogger(__name__)

IS_BASE_MODELS = "it is the base model's own weight"
NOT_IN_BASE_MODEL = "the base model has no such weight or module"


def check_saved_weights(adapter: Adapter, base_model: torch.nn.Module, served: ServedModules) -> dict[str, str]:
    """The tensors saved along that need not be loaded, each with the reason.

    Only this rank's part of a weight is compared.

    Raises:
        AdapterError: weights that differ from the base model's, all of them at once.
    """
    unused: dict[str, str] = {}
    lost: list[str] = []
    parameters = _parameters(base_model) if adapter.saved else {}
    for name, tensor in adapter.saved.items():
        module, _, kind = module_key(name).rpartition(".")
        parameter = parameters.get(module_key(name))
        parts = served.parts.get(module, ())
        if kind == "weight" and parts and parts[0].layer not in served.experts:
            if all(_holds(adapter, tensor, base_model.get_submodule(part.layer), part) for part in parts):
                unused[tensor] = IS_BASE_MODELS
            else:
                lost.append(tensor)
        elif parameter is not None:
            saved = adapter.checkpoint.read_whole(tensor)
            same = saved.shape == parameter.shape and torch.equal(saved.to(parameter), _plain(parameter))
            unused.update({tensor: IS_BASE_MODELS}) if same else lost.append(tensor)
        elif served.is_foreign(module_key(name)) or _is_buffer(kind):
            unused[tensor] = NOT_IN_BASE_MODEL
        else:
            lost.append(tensor)
    if lost:
        raise AdapterError(
            adapter.checkpoint.source,
            tensors_subject(lost),
            "weights that are not LoRA and not the base model's own",
            "LoRA alone: trained modules, embeddings and biases are not supported",
        )
    return unused


def skip_or_refuse(unused: Mapping[str, str], source: str, strict: bool, warns: bool) -> None:
    """Raise `AdapterError` for tensors without a use where ``strict``, else say on the rank that ``warns`` which."""
    if strict:
        refuse_ignored(unused, source)
    for reason in sorted(set(unused.values())) if warns else ():
        tensors = [tensor for tensor, why in unused.items() if why == reason]
        logger.warning("%s: skipped %s: %s", source, tensors_subject(tensors), reason)


def _parameters(base_model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """By key, without the wrappers that LoRA put around modules."""
    named = base_model.named_parameters(remove_duplicate=False)
    return {module_key(name.replace(".base_layer.", ".")): parameter for name, parameter in named}


def _holds(adapter: Adapter, tensor: str, layer: Any, part: ServedModule) -> bool:
    """Whether the layer's weight is ``tensor`` where this rank has it."""
    shard = part.shard
    stored, whole = adapter.checkpoint.shape(tensor), (part.out_features, part.in_features)
    rows, columns = (shard.outputs, shard.inputs), (shard.output_offset, shard.input_offset)
    if part.is_embedding:  # whose weight has a row a token
        whole, rows = whole[::-1], rows[::-1]
    if stored != whole:
        return False
    saved = adapter.checkpoint.read(tensor, *rows)
    weight = _plain(getattr(layer, "base_layer", layer).weight)
    first_row, first_column = columns
    own = weight[first_row : first_row + len(rows[0]), first_column : first_column + len(rows[1])]
    return own.shape == saved.shape and torch.equal(saved.to(own), own)


def _plain(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().to_dense() if weight.is_mkldnn else weight.detach()


def _is_buffer(kind: str) -> bool:
    """What models compute from their config, and old releases of transformers saved."""
    return kind in ("inv_freq", "position_ids", "masked_bias")
