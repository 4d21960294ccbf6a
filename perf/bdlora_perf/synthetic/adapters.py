"""Small random adapters, made by PEFT itself. The same arguments give the same bytes."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bdlora_perf.synthetic.models import model_class

if TYPE_CHECKING:
    from peft import LoraConfig

ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_MODULES = ("gate_proj", "up_proj", "down_proj")
ALL_MODULES = ATTENTION_MODULES + MLP_MODULES

# Which factor is block-diagonal, by module: row-parallel layers A, column-parallel layers B.
BD_A_MODULES = ("o_proj", "down_proj")
BD_B_MODULES = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "qkv_proj", "gate_up_proj", "lm_head")


def lora_config(rank: int, nblocks: int | None, target_modules: Sequence[str] | str, **fields: Any) -> "LoraConfig":
    """PEFT's config of an adapter; ``nblocks`` makes it BD-LoRA, ``fields`` are PEFT's others."""
    from peft import BdLoraConfig, LoraConfig

    bdlora = None
    if nblocks is not None:
        bdlora = BdLoraConfig(
            target_modules_bd_a=[name for name in BD_A_MODULES if name in target_modules] or None,
            target_modules_bd_b=[name for name in BD_B_MODULES if name in target_modules] or None,
            nblocks=nblocks,
        )
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    return LoraConfig(r=rank, target_modules=targets, use_bdlora=bdlora, task_type="CAUSAL_LM", **fields)


def make_adapter(
    folder: str | Path,
    model_folder: str | Path,
    *,
    rank: int = 8,
    nblocks: int | None = None,
    target_modules: Sequence[str] | str = ALL_MODULES,
    seed: int = 0,
    alpha: float | None = None,
    dtype: torch.dtype = torch.float32,
    scale: float = 0.5,
    **fields: Any,
) -> Path:
    """Make a random adapter with PEFT itself, and return its folder.

    Args:
        folder: where PEFT's ``adapter_config.json`` and ``adapter_model.safetensors`` are written.
        model_folder: the base model; only its config is read.
        rank: the whole rank, all blocks together.
        nblocks: blocks of the block-diagonal factors; None makes a plain LoRA adapter.
        target_modules: the last parts of the names of the modules that get LoRA, or a regular expression.
        seed: of the weights.
        alpha: ``lora_alpha``; twice the rank if None.
        dtype: of the stored weights.
        scale: the standard deviation that the adapter adds to a module's output, for inputs of unit variance, whatever
            its rank, blocks and scaling. At the default it changes the tokens and leaves the logits as far apart.
        **fields: PEFT's others, such as ``use_rslora``, ``rank_pattern``, ``layers_to_transform`` and
            ``target_parameters``.

    Raises:
        ValueError: PEFT refuses the arguments, for example blocks that do not divide a module.
    """
    from peft import get_peft_model, get_peft_model_state_dict
    from transformers import AutoConfig

    alpha = 2 * rank if alpha is None else alpha  # PEFT takes any number
    config = lora_config(rank, nblocks, target_modules, lora_alpha=alpha, **fields)
    with torch.device("meta"):  # shapes are all that is needed of the base model, so its size does not matter
        base_config = AutoConfig.from_pretrained(model_folder)
        base = model_class(base_config).from_config(base_config)
        model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}
    for name, layer in sorted(model.named_modules()):
        factors = _factors(layer)
        if factors is None:
            continue
        a, b = (factor for _, factor in factors)
        # A's outputs have unit variance; B's sum as many of them as it has columns (an expert's share of those of all
        # experts). An embedding looks A up.
        a_std = 1.0 if getattr(layer, "lora_embedding_A", None) else 1 / math.sqrt(a.shape[1])
        b_std = scale / (layer.scaling["default"] * math.sqrt(b.shape[1] / getattr(layer, "num_experts", 1)))
        for (suffix, weight), std in zip(factors, (a_std, b_std), strict=True):
            values = std * torch.randn(weight.shape, generator=generator)
            weights[f"{name}.{suffix}"] = values.to(dtype)
    expected = get_peft_model_state_dict(model, state_dict=model.state_dict(), save_embedding_layers=False)
    assert len(weights) == len(expected), "every LoRA tensor is filled"
    folder = Path(folder)
    model.save_pretrained(str(folder), state_dict=weights, save_embedding_layers=False)
    settle_config(folder / "adapter_config.json", model_folder)
    return folder


def _factors(layer: torch.nn.Module) -> list[tuple[str, torch.Tensor]] | None:
    """PEFT's A and B of a linear module or an embedding, each with its name; None where there is no LoRA."""
    for name, suffix in (("lora_embedding_", ".default"), ("lora_", ".default.weight")):
        if getattr(layer, f"{name}A", None):
            factors = [(factor, getattr(layer, f"{name}{factor}")["default"]) for factor in "AB"]
            return [(f"{name}{factor}{suffix}", getattr(weight, "weight", weight)) for factor, weight in factors]
    return None


def settle_config(path: Path, model_folder: str | Path) -> None:
    """Sort what PEFT writes in the order of a set, which changes from process to process, and name the base model."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = os.fspath(model_folder)
    for field in ("target_modules", "target_parameters"):
        if isinstance(config[field], list):
            config[field].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
