"""How many collectives a step of training makes: of the base model, and with each way to add LoRA to it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch.distributed.tensor.debug import CommDebugMode


@dataclass(frozen=True)
class Collectives:
    """Of one step of training, on one rank."""

    forward: int
    backward: int


def count_collectives(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> Collectives:
    """Count them by PyTorch's own `CommDebugMode`.

    Gradients go down to the embedding in every case: a base model that trains nothing would else have no backward to
    compare with.
    """
    model.enable_input_require_grads()
    with CommDebugMode() as forward:
        loss = model(**batch).loss
    with CommDebugMode() as backward:
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
