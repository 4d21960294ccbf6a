"""Adapters to convert, and their dense deltas by PEFT's definition alone, in float64: none of the converter's code."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q, O = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"


def save_lora(
    folder: Path,
    shapes: Mapping[str, tuple[int, int]],
    rank: int = 4,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    integers: bool = False,
    **config: Any,
) -> Path:
    """A plain LoRA adapter on modules of the shapes ``(in, out)``; integer values make every delta exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (inputs, outputs) in shapes.items():
        r = config.get("rank_pattern", {}).get(name, rank)
        for factor, shape in (("A", (r, inputs)), ("B", (outputs, r))):
            values = torch.randint(-4, 5, shape, generator=generator) if integers else None
            values = torch.randn(shape, generator=generator) if values is None else values
            tensors[f"base_model.model.{name}.lora_{factor}.weight"] = values.to(dtype)
    leaves = sorted({name.rpartition(".")[2] for name in shapes})
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": leaves, **config}
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps(fields))
    save_file(tensors, folder / WEIGHTS)
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    return config


def scaling(config: Mapping[str, Any], module: str) -> float:
    r = _by_pattern(config.get("rank_pattern") or {}, module, config["r"])
    alpha = _by_pattern(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
    return float(alpha / (math.sqrt(r) if config.get("use_rslora") else r))


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def dense_factors(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """``(B, A)`` of every module in float64, block-diagonal ones with their zeros."""
    tensors, bd = load_file(folder / WEIGHTS), read_config(folder).get("use_bdlora")
    factors = {}
    for name, tensor in tensors.items():
        if ".lora_A." not in name:
            continue
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        a, b = tensor.double(), tensors[name.replace(".lora_A.", ".lora_B.")].double()
        if bd and any(pattern in module for pattern in bd["target_modules_bd_a"]):
            a = torch.block_diag(*a.chunk(bd["nblocks"]))  # type: ignore[no-untyped-call]
        elif bd and any(pattern in module for pattern in bd["target_modules_bd_b"]):
            b = torch.block_diag(*b.chunk(bd["nblocks"]))  # type: ignore[no-untyped-call]
        factors[module] = b, a
    return factors


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    """Dense ``scaling * B A`` of every module."""
    config = read_config(folder)
    return {module: scaling(config, module) * (b @ a) for module, (b, a) in dense_factors(folder).items()}


def relative_errors(source: Path, other: Path) -> dict[str, float]:
    """Relative Frobenius error of every module of ``other``."""
    expected, found = deltas(source), deltas(other)
    assert expected.keys() == found.keys()
    return {m: float(torch.linalg.norm(found[m] - d) / torch.linalg.norm(d)) for m, d in expected.items()}


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
