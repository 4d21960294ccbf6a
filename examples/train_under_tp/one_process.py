"""The same training by PEFT alone on one process, to compare with; and the adapter's folder."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from bdlora_sglang.convert.folder import NewFolder
from examples.shared.training import fine_tune, load_model

if TYPE_CHECKING:
    from peft import LoraConfig

# The loss before each step [nats a token], and the factors by PEFT's names.
Trained = tuple[list[float], Mapping[str, torch.Tensor]]


def save_adapter(folder: Path, config: "LoraConfig", tensors: Mapping[str, torch.Tensor]) -> None:
    """Write what `PeftModel.save_pretrained` would: ``adapter_config.json`` and ``adapter_model.safetensors``."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with NewFolder(folder, force=True) as new:
        save_file(dict(tensors), new.path / "adapter_model.safetensors", {"format": "pt"})
        config.save_pretrained(str(new.path))
        new.commit()


def train_on_one_process(
    name: str,
    config: "LoraConfig",
    initial: Mapping[str, torch.Tensor],
    batches: Iterable[dict[str, torch.Tensor]],
    learning_rate: float,
) -> Trained:
    """Train PEFT's BD-LoRA of ``config`` on the whole base model, from the factors ``initial``."""
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    model = get_peft_model(load_model(name)[0], config)
    set_peft_model_state_dict(model, dict(initial))
    losses = fine_tune(model, batches, learning_rate)
    return losses, {key: tensor.cpu() for key, tensor in get_peft_model_state_dict(model).items()}


def print_differences(here: Trained, peft: Trained, initial: Mapping[str, torch.Tensor]) -> None:
    """The losses side by side, and how far the weights are apart over how far training moved them."""
    table = Table(title="Trained under tensor parallelism, and by PEFT on one process")
    for column in ("step", "loss", "PEFT's loss", "apart"):
        table.add_column(column, justify="right")
    pairs = list(zip(here[0], peft[0], strict=True))
    shown = sorted({0, 1, 2, len(pairs) // 2, len(pairs) - 1})
    for step in shown:
        ours, theirs = pairs[step]
        table.add_row(str(step + 1), f"{ours:.6f}", f"{theirs:.6f}", f"{abs(ours - theirs):.1e}")
    Console().print(table)
    keys = sorted(peft[1])
    apart, moved = (
        torch.cat([(peft[1][key] - other[key]).flatten() for key in keys]).norm().item() for other in (here[1], initial)
    )
    loss = max(abs(ours - theirs) for ours, theirs in pairs)
    print(f"Largest difference of a loss: {loss:.1e}. Weights: {apart / moved:.1e} of what training moved them by.")
