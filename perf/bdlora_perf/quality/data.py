"""Tasks: text files and prompts with completions, as token ids in batches."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError
from torch.nn.utils.rnn import pad_sequence

from bdlora_sglang.errors import BDLoRAError

IGNORED = -100  # what cross entropy leaves out
# The split is the same for every seed: seeds differ in initial values and in the order of the examples.
_SPLIT_SEED = 0
_POOL = 8


class _Line(BaseModel):
    prompt: str
    completion: str


@dataclass(frozen=True)
class Example:
    """Token ids; the loss is that of those from ``start`` on."""

    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Batch:
    """``ids``, ``mask`` and ``labels`` are (examples, tokens), padded on the right; labels are not shifted."""

    ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class Task:
    """A task, split. ``exact`` says that an example is right or wrong as a whole: it has a prompt and a completion."""

    name: str
    exact: bool
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]


def load_task(path: Path, tokenizer: Any, sequence_length: int, held_out: tuple[int, int]) -> Task:
    """Read ``*.jsonl`` with the fields ``prompt`` and ``completion``, or any other file as plain text.

    A completion ends with the tokenizer's end-of-sequence token. Text is cut in pieces of ``sequence_length`` tokens.

    Args:
        held_out: examples of the validation and of the test split, drawn by a fixed seed.

    Raises:
        BDLoRAError: the file cannot be read, a line is not of that form, an example is longer than a sequence, or too
            few are left to train on.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BDLoRAError(f"--data {path}: found {error}, expected a .jsonl or a text file in UTF-8") from error
    exact = path.suffix == ".jsonl"
    if exact:
        lines = enumerate(text.splitlines(), 1)
        examples = [_pair(f"--data {path}: line {number}", line, tokenizer, sequence_length) for number, line in lines]
    else:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        starts = range(0, len(ids) - sequence_length + 1, sequence_length)
        examples = [Example(tuple(ids[start : start + sequence_length]), 1) for start in starts]
    validation, test = held_out
    if len(examples) <= validation + test:
        raise BDLoRAError(
            f"--data {path}: found {len(examples)} examples, expected more than the {validation} + {test} held out"
        )
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(_SPLIT_SEED)).tolist()
    shuffled = tuple(examples[i] for i in order)
    first, second = validation, validation + test
    return Task(path.stem, exact, shuffled[second:], shuffled[:first], shuffled[first:second])


def _pair(where: str, line: str, tokenizer: Any, sequence_length: int) -> Example:
    try:
        pair = _Line.model_validate_json(line)
    except ValidationError as error:
        found = f"found {line[:60]!r}, expected an object with the texts prompt and completion"
        raise BDLoRAError(f"{where}: {found}") from error
    prompt = tokenizer(pair.prompt)["input_ids"]
    ids = (*prompt, *tokenizer(pair.completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)
    if not prompt or len(ids) > sequence_length:
        raise BDLoRAError(
            f"{where}: found a prompt of {len(prompt)} and {len(ids)} tokens in all, expected a prompt and at most "
            f"--sequence-length {sequence_length}"
        )
    return Example(ids, len(prompt))


def make_batch(examples: Sequence[Example], padding: int, device: torch.device) -> Batch:
    """Pad to the longest example."""

    def padded(rows: Iterable[Sequence[int]], value: int) -> torch.Tensor:
        return pad_sequence([*map(torch.tensor, rows)], batch_first=True, padding_value=value).to(device)

    return Batch(
        padded((example.ids for example in examples), padding),
        padded(([1] * len(example.ids) for example in examples), 0),
        padded(((IGNORED,) * example.start + example.ids[example.start :] for example in examples), IGNORED),
    )


def training_batches(examples: Sequence[Example], size: int, seed: int) -> Iterator[list[Example]]:
    """Batches without end: the examples in a new order each time they are through.

    Of `_POOL` batches' examples, those of like length share a batch, which leaves little padding; examples of one
    length keep their order.
    """
    generator = torch.Generator().manual_seed(seed)
    pending: list[int] = []
    while True:
        while len(pending) < size * _POOL:
            pending += torch.randperm(len(examples), generator=generator).tolist()
        pool, pending = pending[: size * _POOL], pending[size * _POOL :]
        by_length = sorted(range(len(pool)), key=lambda place: len(examples[pool[place]].ids))
        batches = (by_length[start : start + size] for start in range(0, len(pool), size))
        for places in sorted(batches, key=min):
            yield [examples[pool[place]] for place in places]


def calibration_text(task: Task, tokenizer: Any, tokens: int) -> str:
    """The first training examples as text, of about ``tokens`` tokens."""
    starts = accumulate((len(example.ids) for example in task.train), initial=0)
    chosen = (example.ids for start, example in zip(starts, task.train, strict=False) if start < tokens)
    return "\n".join(tokenizer.decode(ids, skip_special_tokens=True) for ids in chosen) + "\n"
