"""Convert a LoRA to BD-LoRA, see what it costs, and heal what was cut off by a short further fine-tune.

Run ``python -m examples.convert_and_heal.convert --tp 2``, then ``python -m examples.serve``.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bdlora_sglang.convert import ConvertOptions, RankChoice, compare_deltas, inspect_adapter, lora2bd
from examples.shared.command_line import Data, LearningRate, Model, Rank, Seed, Steps, TPDegree, run
from examples.shared.data import OPPOSITES, make_batches, read_rows
from examples.shared.training import WORK, base_model, fine_tune, load_model, lora_config, mean_loss


def main(
    model: Model = None,
    lora: Annotated[Path | None, typer.Option(help="A plain LoRA of that model; default: one is trained.")] = None,
    data: Data = OPPOSITES,
    tp: TPDegree = 2,
    param_ratio: Annotated[float, typer.Option(help="Parameters of the BD-LoRA over the LoRA's.")] = 0.5,
    rank: Rank = 8,
    steps: Steps = 60,
    heal_steps: Annotated[int, typer.Option(min=1, help="Steps of the further fine-tune.")] = 15,
    learning_rate: LearningRate = 5e-3,
    seed: Seed = 0,
    output: Annotated[Path, typer.Option(help="Where the adapters go.")] = WORK / "adapters",
) -> None:
    """Convert a LoRA for a TP degree, and heal it."""
    from peft import PeftModel, get_peft_model

    name, rows = base_model(model), read_rows(data)
    base, tokenizer = load_model(name)
    if lora is None:
        lora = output / "lora"
        peft_model = get_peft_model(base, lora_config(rank, None, name))
        fine_tune(peft_model, make_batches(rows, tokenizer, steps, seed), learning_rate)
        peft_model.save_pretrained(str(lora))
        base = peft_model.unload()

    lora2bd(lora, output / "lossless", ConvertOptions(tp, force=True), lossless=True)
    lora2bd(lora, output / "truncated", ConvertOptions(tp, RankChoice(param_ratio=param_ratio), force=True))

    healed = PeftModel.from_pretrained(base, str(output / "truncated"), adapter_name="healed", is_trainable=True)
    fine_tune(healed, make_batches(rows, tokenizer, heal_steps, seed + 1), learning_rate / 5)
    healed.save_pretrained(str(output))  # PEFT puts an adapter in a subfolder of its name

    table = Table(title=f"Converted for TP {tp}", caption="loss: nats a token on the data; delta: error of the weights")
    for column in ("adapter", "blocks", "rank", "parameters", "KiB a GPU", "delta", "loss"):
        table.add_column(column)
    for folder in (lora, output / "lossless", output / "truncated", output / "healed"):
        healed.load_adapter(str(folder), "shown")
        healed.set_adapter("shown")
        found = inspect_adapter(folder, [tp])
        error = max(difference.frobenius for difference in compare_deltas(lora, folder))
        table.add_row(
            folder.name,
            str(found.nblocks),
            "/".join(map(str, found.ranks)),
            f"{found.num_parameters:,}",
            f"{found.bytes_per_gpu[0].communication_free / 2**10:.0f}",
            f"{error:.2f}",
            f"{mean_loss(healed, make_batches(rows, tokenizer, steps=2, seed=seed)):.4f}",
        )
        healed.set_adapter("healed")
        healed.delete_adapter("shown")
    Console().print(table)
    typer.echo(f"bdlora launch --model {name} --tp {tp} --adapters {output}")


if __name__ == "__main__":
    run(main)
