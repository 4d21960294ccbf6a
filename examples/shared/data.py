"""Prompts with the completions to learn, as batches."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bdlora_sglang.errors import BDLoRAError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPPOSITES = Path(__file__).with_name("opposites.jsonl")
# The label that a loss of transformers leaves out.
_NO_LABEL = -100


@dataclass(frozen=True)
class Row:
    """One line of the data."""

    prompt: str
    completion: str


def read_rows(path: Path) -> list[Row]:
    """JSON lines of ``{"prompt": ..., "completion": ...}``.

    Raises:
        BDLoRAError: a line is anything else.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [_read_row(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]
    if not rows:
        raise BDLoRAError(f"{path}: found no line, expected at least one")
    return rows


def _read_row(line: str, where: str) -> Row:
    try:
        found = json.loads(line)
        return Row(str(found["prompt"]), str(found["completion"]))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        expected = 'expected {"prompt": ..., "completion": ...}'
        raise BDLoRAError(f"{where}: found {line[:80]!r}, {expected}") from error


def make_batches(
    rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase", steps: int, seed: int, batch_size: int = 8
) -> Iterator[dict[str, torch.Tensor]]:
    """``steps`` batches of rows drawn without replacement, epoch after epoch; the same seed draws the same.

    Yields:
        ``input_ids``, ``attention_mask`` and ``labels``, each (batch, tokens). The loss is the completion's alone.
    """
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        while len(order) < batch_size:
            order += torch.randperm(len(rows), generator=generator).tolist()
        drawn, order = order[:batch_size], order[batch_size:]
        yield _batch([rows[index] for index in drawn], tokenizer)


def _batch(rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase") -> dict[str, torch.Tensor]:
    prompts = [tokenizer.encode(row.prompt) for row in rows]
    completions = [
        [*tokenizer.encode(row.completion, add_special_tokens=False), tokenizer.eos_token_id] for row in rows
    ]
    length = max(len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True))
    input_ids_BT = torch.full((len(rows), length), tokenizer.eos_token_id)
    attention_mask_BT = torch.zeros_like(input_ids_BT)
    labels_BT = torch.full_like(input_ids_BT, _NO_LABEL)
    for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        end = len(prompt) + len(completion)
        input_ids_BT[index, :end] = torch.tensor(prompt + completion)
        attention_mask_BT[index, :end] = 1
        labels_BT[index, len(prompt) : end] = torch.tensor(completion)
    return {"input_ids": input_ids_BT, "attention_mask": attention_mask_BT, "labels": labels_BT}
