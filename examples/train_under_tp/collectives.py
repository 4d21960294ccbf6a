"""How many collectives a step of training makes: of the base model, and with each way to add LoRA to it."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table
from torch.distributed.tensor.debug import CommDebugMode

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Collectives:
    """Of one step of training, on one rank."""

    forward: int
    backward: int


def count_collectives(model: "PreTrainedModel | PeftModel", batch: Mapping[str, torch.Tensor]) -> Collectives:
    """Count them by PyTorch's own `CommDebugMode`.

    Gradients go down to the embedding in every case: a base model that trains nothing would else have no backward to
    compare with.
    """
    model.enable_input_require_grads()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "For backward hooks to be called")  # CommDebugMode's, which we need not
        with CommDebugMode() as forward:  # type: ignore[no-untyped-call]
            loss = model(**batch).loss
        with CommDebugMode() as backward:  # type: ignore[no-untyped-call]
            loss.backward()
    model.disable_input_require_grads()
    model.zero_grad()
    return Collectives(forward.get_total_counts(), backward.get_total_counts())


def print_collectives(counted: Mapping[str, Collectives]) -> None:
    """A row for each; the first is what the others are compared with."""
    table = Table(title="Collectives of a step of training")
    table.add_column("model")
    for column in ("forward", "backward", "for LoRA"):
        table.add_column(column, justify="right")
    base = next(iter(counted.values()))
    for label, found in counted.items():
        added = found.forward + found.backward - base.forward - base.backward
        table.add_row(label, str(found.forward), str(found.backward), str(added))
    Console().print(table)
