"""Train a BD-LoRA adapter with PEFT, with a block for every rank that shall serve it.

Run ``python -m examples.train_and_serve.train --tp 2``, then ``python -m examples.serve``.
"""

from pathlib import Path
from typing import Annotated

import typer

from examples.shared.command_line import Data, LearningRate, Model, Rank, Seed, Steps, TPDegree, run
from examples.shared.data import OPPOSITES, make_batches, read_rows
from examples.shared.training import WORK, base_model, fine_tune, load_model, lora_config


def main(
    model: Model = None,
    data: Data = OPPOSITES,
    tp: TPDegree = 2,
    rank: Rank = 8,
    steps: Steps = 60,
    learning_rate: LearningRate = 5e-3,
    seed: Seed = 0,
    output: Annotated[Path, typer.Option(help="The adapter's folder.")] = WORK / "adapters" / "trained",
) -> None:
    """Train a BD-LoRA adapter for a TP degree."""
    from peft import get_peft_model

    from bdlora_perf.quality.init import initialise_like_lora

    name = base_model(model)
    base, tokenizer = load_model(name)
    peft_model = get_peft_model(base, lora_config(rank, tp, name))
    initialise_like_lora(peft_model, seed)  # PEFT's own values are several times larger: see the README
    peft_model.print_trainable_parameters()

    losses = fine_tune(peft_model, make_batches(read_rows(data), tokenizer, steps, seed), learning_rate)
    peft_model.save_pretrained(str(output))
    typer.echo(f"Loss {losses[0]:.3f} -> {losses[-1]:.3f} nats a token. {output}: {tp} blocks, rank {rank}.")
    typer.echo(f"bdlora launch --model {name} --tp {tp} --adapters {output}")


if __name__ == "__main__":
    run(main)
