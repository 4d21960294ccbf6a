"""Fine-tuning an adapter with PEFT, and what it then makes of held-out examples."""

import math
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from bdlora_perf.quality.data import IGNORED, Batch, Example, Task, make_batch, training_batches
from bdlora_perf.quality.init import Init, initialise_like_lora
from bdlora_perf.quality.plan import Plan, QualityOptions
from bdlora_perf.quality.systems import TARGETS, AdapterShape
from bdlora_perf.synthetic.adapters import lora_config
from bdlora_sglang.convert.options import DTYPES
from bdlora_sglang.errors import BDLoRAError

if TYPE_CHECKING:
    from peft import PeftModel

# Usual for LoRA: a short linear warm-up, then down to zero along a line; no weight decay.
_WARM_UP = 0.1
_LARGEST_GRADIENT = 1.0
# JSON has no infinity. This is worse than a uniform guess over any vocabulary.
_DIVERGED = 100.0
_EVALUATED = 4  # batches at once: without gradients there is room for them


@dataclass(frozen=True)
class Evaluation:
    """Of held-out examples.

    ``loss``: mean negative log-likelihood of a target token, nats. ``token_accuracy``: the part of target tokens that
    are the likeliest after those before. ``accuracy``: of a task with completions the part of them that greedy decoding
    reproduces to the last token, its end included; of a text the same as ``token_accuracy``.
    """

    loss: float
    accuracy: float
    token_accuracy: float


@dataclass(frozen=True)
class Trainer:
    """A base model with its tokenizer, and how adapters are trained on it."""

    base: Any
    tokenizer: Any
    device: torch.device
    plan: Plan

    @classmethod
    def load(cls, options: QualityOptions) -> "Trainer":
        """Raises `BDLoRAError` where transformers cannot load the folder's model and tokenizer."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = options.model
        try:
            device = torch.device(options.device)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            base: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[options.plan.dtype])
            base = base.to(device)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise BDLoRAError(f"--model {folder}: found {reason}, expected a causal language model") from error
        if tokenizer.eos_token_id is None:
            raise BDLoRAError(f"--model {folder}: found no end-of-sequence token, expected one to end completions with")
        base.requires_grad_(False)
        return cls(base, tokenizer, device, options.plan)

    def new_adapter(self, shape: AdapterShape, seed: int, init: Init) -> "PeftModel":
        """A fresh adapter on a copy of the base model."""
        from peft import get_peft_model

        nblocks = None if shape.nblocks == 1 else shape.nblocks
        targets, alpha = TARGETS[self.plan.target_modules], self.plan.scaling * shape.rank
        config = lora_config(shape.rank, nblocks, targets, lora_alpha=alpha)
        return initialise_like_lora(get_peft_model(self._copy(), config), seed, init)

    def read_adapter(self, folder: Path) -> "PeftModel":
        """PEFT's own reading of a saved adapter, to be trained on, on a copy of the base model."""
        from peft import PeftModel

        return PeftModel.from_pretrained(self._copy(), str(folder), is_trainable=True)

    def _copy(self) -> Any:
        """The base model's modules anew, for PEFT changes them; its weights, which are frozen, are shared."""
        return deepcopy(self.base, {id(weight): weight for weight in self.base.parameters()})

    def train(self, model: "PeftModel", examples: Sequence[Example], steps: int, rate: float, seed: int) -> list[float]:
        """Change the adapter in place; returns the loss of every step. ``seed`` decides the order of the examples."""
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=rate, weight_decay=0.0)
        warm = max(1, round(_WARM_UP * steps))
        schedule = LambdaLR(optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm)))
        batches = map(self._batch, training_batches(examples, self.plan.batch_size, seed))
        losses = list(descend(model, islice(batches, steps), schedule))
        values = torch.stack(losses).tolist()  # at the end: on a GPU each value that is read is waited for
        return [_finite(value) for value in values]

    def evaluate(self, model: Any, task: Task, examples: Sequence[Example]) -> Evaluation:
        """One forward over the examples. A loss that is no number is infinitely bad: training diverged."""
        model.eval()
        loss, tokens, hits, exact = 0.0, 0, 0, 0
        by_length = sorted(examples, key=lambda example: len(example.ids))  # little padding
        size = self.plan.batch_size * _EVALUATED
        with torch.inference_mode():
            for start in range(0, len(examples), size):
                logits, targets = target_logits(model, self._batch(by_length[start : start + size]))
                wanted = targets != IGNORED
                loss += float(cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
                tokens += int(wanted.sum())
                is_hit = logits.argmax(-1) == targets
                hits += int((is_hit & wanted).sum())
                # Greedy decoding gives the completion just when each of its tokens is the likeliest after those before.
                exact += int((is_hit | ~wanted).all(-1).sum())
        token_accuracy = hits / tokens
        accuracy = exact / len(examples) if task.exact else token_accuracy
        return Evaluation(_finite(loss / tokens), accuracy, token_accuracy)

    def _batch(self, examples: Sequence[Example]) -> Batch:
        return make_batch(examples, self.tokenizer.eos_token_id, self.device)


def target_logits(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """What the model says of the targets, and the targets.

    The output head, a fifth of a small model's work, is left out where no example of the batch has a target.

    Returns:
        Logits (examples, columns, vocabulary) in float32, and the token ids (examples, columns) that they are to
        predict, `IGNORED` where an example has no target.
    """
    labels = batch.labels[:, 1:]
    columns = (labels != IGNORED).any(0).nonzero().squeeze(1)
    output = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False, logits_to_keep=columns)
    return output.logits.float(), labels[:, columns]


def descend(model: torch.nn.Module, batches: Iterable[Batch], schedule: LRScheduler) -> Iterator[torch.Tensor]:
    """Train what is trainable, one step a batch; yields the loss before each step, nats a target token."""
    model.train()
    for batch in batches:
        logits, targets = target_logits(model, batch)
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), _LARGEST_GRADIENT)
        schedule.optimizer.step()
        schedule.optimizer.zero_grad()
        schedule.step()
        yield loss.detach()


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else _DIVERGED
