"""``python -m bdlora_perf.demo_adapters.train``: train the demo's adapters with PEFT, anew and with the same result.

Each adapter's folder gets PEFT's two files and ``training.json``: the settings, the loss of every step, and the part of
the test reviews that it then answers right to the last token. ``loss.svg`` beside the folders shows the losses.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console

from bdlora_perf.demo_adapters.reviews import Review, read_reviews
from bdlora_perf.demo_adapters.tasks import ADAPTERS, ADAPTERS_FOLDER, DemoAdapter, chat_answer, chat_prompt
from bdlora_perf.quality.init import initialise_like_lora
from bdlora_perf.smollm2 import NAME, make_smollm2
from bdlora_perf.synthetic.adapters import ALL_MODULES, lora_config, settle_config
from bdlora_perf.synthetic.reference import PeftReference

# The upper half of the layers: nothing is sent back through the lower half, which saves a third of the time.
_LAYERS = range(15, 30)
_MODEL = Path(".demo/model")


@dataclass(frozen=True)
class Settings:
    """Of a training run; the rest is `transformers.Trainer`'s default, AdamW among it."""

    steps: int = 100
    batch_size: int = 4
    learning_rate: float = 2e-3
    warmup_steps: int = 10
    seed: int = 0


def train(adapter: DemoAdapter, model_folder: Path, folder: Path, settings: Settings) -> list[float]:
    """Train an adapter, and save it in float16.

    Args:
        model_folder: SmolLM2, as `make_smollm2` writes it.
        folder: where PEFT's two files are written.

    Returns:
        The loss of each step before it, in nats a token of the answers.
    """
    import transformers
    from peft import get_peft_model

    transformers.set_seed(settings.seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    alpha, layers = 2 * adapter.rank, list(_LAYERS)
    config = lora_config(adapter.rank, adapter.nblocks, ALL_MODULES, lora_alpha=alpha, layers_to_transform=layers)
    base = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model = initialise_like_lora(get_peft_model(base, config), settings.seed)
    with TemporaryDirectory() as unused:
        arguments = transformers.TrainingArguments(
            output_dir=unused,
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            warmup_steps=settings.warmup_steps,
            seed=settings.seed,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,  # where the committed adapters come from
        )
        trainer = transformers.Trainer(
            model,
            arguments,
            train_dataset=[_example(tokenizer, review, adapter.name) for review in read_reviews("train")],
            data_collator=transformers.DataCollatorForSeq2Seq(tokenizer),
        )
        trainer.train()
    model.half().save_pretrained(str(folder))
    settle_config(folder / "adapter_config.json", NAME)
    (folder / "README.md").unlink()  # PEFT's form of a model card, empty
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _example(tokenizer: Any, review: Review, task: str) -> dict[str, list[int]]:
    """The loss is that of the answer alone."""
    prompt, answer = chat_prompt(tokenizer, review.text), chat_answer(tokenizer, review.answers[task])
    return {
        "input_ids": prompt + answer,
        "attention_mask": [1] * len(prompt + answer),
        "labels": [-100] * len(prompt) + answer,
    }


def accuracy(model_folder: Path, adapter: Path, task: str, reviews: Sequence[Review]) -> float:
    """The part of ``reviews`` that an adapter answers right under PEFT, to the last token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    reference = PeftReference(model_folder)
    asked = [(chat_prompt(tokenizer, r.text), chat_answer(tokenizer, r.answers[task])) for r in reviews]
    return sum(reference.is_greedy(prompt, adapter, answer) for prompt, answer in asked) / len(asked)


def draw_losses(folder: Path) -> None:
    """``loss.svg`` from each adapter's ``training.json``."""
    import pandas as pd
    import seaborn as sns
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "bdlora", "svg.fonttype": "path"}):
        runs = {adapter.name: json.loads((folder / adapter.name / "training.json").read_text()) for adapter in ADAPTERS}
        losses = pd.DataFrame({name: run["loss"] for name, run in runs.items()}).rename_axis("step")
        axes = sns.lineplot(losses, dashes=False)
        axes.set(yscale="log", ylabel="loss of a batch, nats a token of the answers")
        axes.figure.savefig(folder / "loss.svg", metadata={"Date": None}, bbox_inches="tight")


def main() -> None:
    """Train all adapters, or those named, test them and draw the losses."""
    parser = argparse.ArgumentParser(prog="python -m bdlora_perf.demo_adapters.train", description=__doc__)
    parser.add_argument("name", nargs="*", help="train these adapters alone")
    parser.add_argument("--model", type=Path, default=_MODEL, help="SmolLM2's folder, made if need be: %(default)s")
    parser.add_argument("--output", type=Path, default=ADAPTERS_FOLDER, help="where the adapters go: %(default)s")
    options = parser.parse_args()
    model, settings = make_smollm2(options.model), Settings()
    for adapter in ADAPTERS:
        if adapter.name in options.name or not options.name:
            folder = options.output / adapter.name
            losses = train(adapter, model, folder, settings)
            right = accuracy(model, folder, adapter.name, read_reviews("test"))
            run = {"settings": asdict(settings), "accuracy": right, "loss": losses}
            (folder / "training.json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
            Console().print(f"{adapter.name}: loss {losses[0]:.3f} to {losses[-1]:.3f}, {right:.0%} of the tests right")
    if all((options.output / adapter.name / "training.json").exists() for adapter in ADAPTERS):
        draw_losses(options.output)


if __name__ == "__main__":
    main()
