"""The base model, LoRA's settings and the training loop."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.progress import track

from bdlora_perf.synthetic import ALL_MODULES, BD_A_MODULES, BD_B_MODULES, make_model

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Where the examples leave what they make.
WORK = Path(".examples")


def base_model(model: str | None) -> str:
    """The user's model, a folder or a name on the hub; without one a small random Llama, made here."""
    if model is not None:
        return model
    folder = WORK / "model"
    if not (folder / "config.json").exists():
        make_model(folder)
    return str(folder)


def load_model(name: str) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The base model, frozen by PEFT later, and its tokenizer; on a GPU where there is one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    return model.to(device), AutoTokenizer.from_pretrained(name)


def lora_config(rank: int, nblocks: int | None, model: str) -> "LoraConfig":
    """PEFT's settings for LoRA on all linear layers of a Llama, a Qwen or a Mistral; ``nblocks`` makes it BD-LoRA."""
    from peft import BdLoraConfig, LoraConfig

    bdlora = None
    if nblocks is not None:
        bdlora = BdLoraConfig(
            target_modules_bd_a=[name for name in BD_A_MODULES if name in ALL_MODULES],  # row-parallel: o and down
            target_modules_bd_b=[name for name in BD_B_MODULES if name in ALL_MODULES],  # column-parallel: the others
            nblocks=nblocks,
        )
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=list(ALL_MODULES),
        use_bdlora=bdlora,
        base_model_name_or_path=model,
        task_type="CAUSAL_LM",
    )


def fine_tune(
    model: torch.nn.Module, batches: Iterable[dict[str, torch.Tensor]], learning_rate: float, *, quiet: bool = False
) -> list[float]:
    """Train what is trainable by AdamW, a step a batch.

    Returns:
        The loss before each step, in nats a token.
    """
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trainable, learning_rate)
    model.train()
    losses = []
    for batch in track(list(batches), "Training", disable=quiet):
        loss = model(**{name: tensor.to(trainable[0].device) for name, tensor in batch.items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@torch.inference_mode()
def mean_loss(model: torch.nn.Module, batches: Iterable[dict[str, torch.Tensor]]) -> float:
    """The loss in nats a token, the mean over the batches."""
    device = next(model.parameters()).device
    losses = [model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss.item() for batch in batches]
    return float(sum(losses) / len(losses))
