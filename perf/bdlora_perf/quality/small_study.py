"""A study's own base model, and tasks for it: ``python -m bdlora_perf.quality.small_study FOLDER``."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from bdlora_perf.quality.data import Example, make_batch, training_batches
from bdlora_perf.quality.stdlib_tasks import Library, standard_library, write_tasks
from bdlora_perf.quality.train import descend
from bdlora_perf.synthetic.tokenizer import train_tokenizer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 1024
# All sizes can be cut in 8 blocks; with 8 of them rank 2r has 0.89 times LoRA's parameters, close to the paper's 0.86.
SHAPE: dict[str, Any] = {
    "hidden_size": 160,
    "intermediate_size": 480,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 20,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
_EOS = "<|end|>"
_SEQUENCE, _BATCH, _LEARNING_RATE = 64, 32, 3e-3


def make_study(
    folder: Annotated[Path, typer.Argument(help="Where model/ and tasks/ go.")],
    steps: Annotated[int, typer.Option(help="Of the training from nothing.")] = 1500,
    seed: int = 0,
) -> None:
    """Write a study's own base model, and tasks for it.

    The model is a Llama of 1.4 million parameters with a tokenizer of its own, trained from nothing on the docstrings
    of the standard library. Another version of Python has other docstrings, and so gives another model.
    """
    library = Library.read(standard_library())
    lines = "\n\n".join(library.docstrings).splitlines(keepends=True)
    tokenizer = train_tokenizer(lines, VOCABULARY, [_EOS], eos_token=_EOS, pad_token=_EOS)
    write_tasks(folder / "tasks", library, tokenizer, seed)
    model = _pretrain(tokenizer, library.docstrings, steps, seed)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


def _pretrain(tokenizer: "PreTrainedTokenizerFast", texts: Sequence[str], steps: int, seed: int) -> "LlamaForCausalLM":
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    end = tokenizer.eos_token_id
    config = LlamaConfig(vocab_size=VOCABULARY, bos_token_id=end, eos_token_id=end, pad_token_id=end, **SHAPE)
    model = LlamaForCausalLM(config)
    # The end token is trained, too: adapters cannot teach it where the embedding is tied and frozen.
    ids = [token for text in texts for token in (*tokenizer(text, verbose=False)["input_ids"], end)]
    pieces = [Example(tuple(ids[i : i + _SEQUENCE]), 1) for i in range(0, len(ids) - _SEQUENCE, _SEQUENCE)]
    print(f"{len(ids):,} tokens, {model.num_parameters():,} parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=steps + 1, pct_start=0.1)
    chosen = islice(training_batches(pieces, _BATCH, seed), steps)
    batches = (make_batch(examples, end, torch.device("cpu")) for examples in chosen)
    for step, loss in enumerate(descend(model, batches, schedule), 1):
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    return model


if __name__ == "__main__":
    typer.run(make_study)
