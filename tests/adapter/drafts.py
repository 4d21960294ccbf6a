"""An adapter to be spoilt, and the check of the message that says so."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bdlora_sglang.errors import AdapterError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model.model.layers.0"
Q, O = f"{PREFIX}.self_attn.q_proj", f"{PREFIX}.self_attn.o_proj"


@dataclass
class Draft:
    """An adapter with four blocks of rank 8, on a q of 32 to 64 features and an o of 64 to 32, to be spoilt."""

    config: dict[str, Any] = field(
        default_factory=lambda: {
            "peft_type": "LORA",
            "r": 8,
            "lora_alpha": 16,
            "target_modules": ["q_proj", "o_proj"],
            "use_bdlora": {"nblocks": 4, "target_modules_bd_a": ["o_proj"], "target_modules_bd_b": ["q_proj"]},
        }
    )
    tensors: dict[str, torch.Tensor] = field(
        default_factory=lambda: {
            f"{Q}.lora_A.weight": torch.ones(8, 32),
            f"{Q}.lora_B.weight": torch.ones(64, 2),
            f"{O}.lora_A.weight": torch.ones(8, 16),
            f"{O}.lora_B.weight": torch.ones(32, 8),
        }
    )

    def save(self, folder: Path) -> Path:
        folder.mkdir(exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(self.config))
        save_file(self.tensors, folder / WEIGHTS)
        return folder


def assert_refused(error: AdapterError, source: str, subject: str, found: str, expected: str) -> None:
    assert error.source.endswith(source)
    assert subject in error.subject
    assert found in str(error.found)
    assert expected in str(error.expected)
    assert str(error) == f"{error.source}: {error.subject}: found {error.found}, expected {error.expected}"
