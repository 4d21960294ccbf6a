"""Tasks: text files and prompts with completions, as token ids in batches."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from bdlora_sglang.errors import BDLoRAError

IGNORED = -100  # what cross entropy leaves out
# The split is the same for every seed: seeds differ in initial values and in the order of the examples.
_SPLIT_SEED = 0
_POOL = 8


class _Line(BaseModel):
    model_config = ConfigDict(extra="ignore")

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


def task_name(path: Path) -> str:
    return path.stem


def digest(path: Path) -> str:
    """SHA-256 of a file; raises `BDLoRAError` where it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise BDLoRAError(f"--data {path}: found {error.strerror}, expected a .jsonl or a text file") from error


def load_task(path: Path, tokenizer: Any, sequence_length: int, held_out: tuple[int, int]) -> Task:
    """Read ``*.jsonl`` with the fields ``prompt`` and ``completion``, or any other file as plain text.

    A completion ends with the tokenizer's end-of-sequence token. Text is cut in pieces of ``sequence_length`` tokens.

    Args:
        held_out: examples of the validation and of the test split, drawn by a fixed seed.

    Raises:
        BDLoRAError: the file cannot be read, a line is not of that form, an example is longer than a sequence, or too
            few are left to train on.
    """
    exact = path.suffix == ".jsonl"
    examples = list(_pairs(path, tokenizer, sequence_length) if exact else _pieces(path, tokenizer, sequence_length))
    validation, test = held_out
    if len(examples) <= validation + test:
        raise BDLoRAError(
            f"--data {path}: found {len(examples)} examples, expected more than the {validation} + {test} held out"
        )
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(_SPLIT_SEED)).tolist()
    shuffled = tuple(examples[i] for i in order)
    first, second = validation, validation + test
    return Task(task_name(path), exact, shuffled[second:], shuffled[:first], shuffled[first:second])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BDLoRAError(f"--data {path}: found {error}, expected a .jsonl or a text file in UTF-8") from error


def _pairs(path: Path, tokenizer: Any, sequence_length: int) -> Iterator[Example]:
    for number, line in enumerate(_read(path).splitlines(), 1):
        try:
            pair = _Line.model_validate_json(line)
        except ValidationError as error:
            raise BDLoRAError(
                f"--data {path}: line {number}: found {line[:60]!r}, expected an object with the texts prompt and "
                "completion"
            ) from error
        prompt = tokenizer(pair.prompt)["input_ids"]
        completion = tokenizer(pair.completion, add_special_tokens=False)["input_ids"]
        ids = (*prompt, *completion, tokenizer.eos_token_id)
        if not prompt or len(ids) > sequence_length:
            raise BDLoRAError(
                f"--data {path}: line {number}: found a prompt of {len(prompt)} and {len(ids)} tokens in all, expected "
                f"a prompt and at most --sequence-length {sequence_length}"
            )
        yield Example(ids, len(prompt))


def _pieces(path: Path, tokenizer: Any, sequence_length: int) -> Iterator[Example]:
    ids = tokenizer(_read(path), add_special_tokens=False, verbose=False)["input_ids"]
    for start in range(0, len(ids) - sequence_length + 1, sequence_length):
        yield Example(tuple(ids[start : start + sequence_length]), 1)


def make_batch(examples: Sequence[Example], padding: int, device: torch.device) -> Batch:
    """Pad to the longest example."""
    longest = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), longest), padding)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for i, example in enumerate(examples):
        row = torch.tensor(example.ids)
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
        labels[i, example.start : len(row)] = row[example.start :]
    return Batch(ids.to(device), mask.to(device), labels.to(device))


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
    texts, found = [], 0
    for example in task.train:
        if found >= tokens:
            break
        texts.append(tokenizer.decode(example.ids, skip_special_tokens=True))
        found += len(example.ids)
    return "\n".join(texts) + "\n"
