"""The models and adapters that the serving tests share, made once a session."""

import itertools
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bdlora_perf.synthetic import ALL_MODULES, make_adapter, make_model

# Every block count, plain LoRA, and each of the ways in which an adapter can be irregular.
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain-r4-qv": {"rank": 4, "target_modules": ["q_proj", "v_proj"]},
    "plain-r16": {"rank": 16},
    "plain-r5-rslora": {"rank": 5, "use_rslora": True, "target_modules": ["k_proj", "o_proj", "up_proj"]},
    "bd1-r8": {"rank": 8, "nblocks": 1},
    "bd2-r8": {"rank": 8, "nblocks": 2},
    "bd3-r12": {"rank": 12, "nblocks": 3},
    "bd4-r8": {"rank": 8, "nblocks": 4},
    "bd8-r16": {"rank": 16, "nblocks": 8},
    "bd2-v-down-layer1": {
        "rank": 6,
        "nblocks": 2,
        "target_modules": ["v_proj", "down_proj"],
        "layers_to_transform": [1],
    },
    "bd4-patterns-rslora": {
        "rank": 8,
        "nblocks": 4,
        "use_rslora": True,
        "rank_pattern": {"q_proj": 16, "layers.2.mlp.down_proj": 4},
        "alpha_pattern": {"o_proj": 5},
    },
}


@dataclass
class Zoo:
    """Makes models and adapters below ``root`` when they are first asked for."""

    root: Path
    _made: set[Path] = field(default_factory=set)

    def model(self, architecture: str, **overrides: Any) -> Path:
        suffix = "".join(f"-{key}{value}" for key, value in sorted(overrides.items()))
        folder = self.root / f"{architecture}{suffix}" / "model"
        if folder not in self._made:
            make_model(folder, architecture, **overrides)
            self._made.add(folder)
        return folder

    def adapters(self, model: Path, but: Collection[str] = ()) -> dict[str, Path]:
        """All of `ADAPTERS` for ``model`` but some, by name, side by side in one folder."""
        return {
            name: self.adapter(model, name, seed=seed, **spec)
            for seed, (name, spec) in enumerate(ADAPTERS.items())
            if name not in but
        }

    def adapter(self, model: Path, name: str, **spec: Any) -> Path:
        folder = model.parent / "adapters" / name
        if folder not in self._made:
            make_adapter(folder, model, **{"target_modules": ALL_MODULES, **spec})
            self._made.add(folder)
        return folder


# CI runs Llama on every TP degree and three more architectures on one; `--full` runs five architectures on each, and
# both shardings. Mistral's intermediate size is one that SGLang pads at TP 2 and 4.
OVERRIDES: dict[str, dict[str, Any]] = {"mistral": {"intermediate_size": 480}}
ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "gemma")
FREE, SHARDED = "communication-free", "fully-sharded"
# Every architecture, degree and sharding at least once.
CI_CASES = {
    ("llama", 4, FREE),
    ("mistral", 2, FREE),
    ("qwen2", 2, SHARDED),
    ("gemma", 1, FREE),
}
CASES = list(itertools.product(ARCHITECTURES, (1, 2, 4), (FREE, SHARDED)))

PROMPTS: tuple[list[int], ...] = ([11, 23, 5, 42, 77, 130, 8], [301], list(range(60, 101)))
