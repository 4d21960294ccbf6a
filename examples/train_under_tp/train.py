"""Train a BD-LoRA adapter under tensor parallelism, a block a rank, with no collective for LoRA.

Run ``torchrun --nproc-per-node 2 -m examples.train_under_tp.train``, then ``python -m examples.serve``.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import torch.distributed as dist
import typer
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from examples.shared.command_line import Data, LearningRate, Model, Rank, Seed, Steps, run
from examples.shared.data import OPPOSITES, make_batches, read_rows
from examples.shared.training import WORK, base_model, fine_tune, lora_config
from examples.train_under_tp.collectives import count_collectives, print_collectives
from examples.train_under_tp.one_process import print_differences, save_adapter, train_on_one_process
from examples.train_under_tp.shards import gather, with_bd_lora

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def main(
    model: Model = None,
    data: Data = OPPOSITES,
    rank: Rank = 8,
    steps: Steps = 60,
    learning_rate: LearningRate = 5e-3,
    seed: Seed = 0,
    check: Annotated[bool, typer.Option(help="Train the same by PEFT on one process, and compare.")] = True,
    output: Annotated[Path, typer.Option(help="The adapter's folder.")] = WORK / "adapters" / "trained-under-tp",
) -> None:
    """Train a BD-LoRA adapter on the ranks that torchrun started."""
    from peft import get_peft_model
    from transformers import AutoTokenizer

    mesh = start_ranks()
    first, name = mesh.get_rank() == 0, on_rank_0_first(model)
    config = lora_config(rank, mesh.size(), name)
    batches = list(make_batches(read_rows(data), AutoTokenizer.from_pretrained(name), steps, seed))

    # Each on a base model of its own: what is put around the layers stays there.
    plain = get_peft_model(load_split(name), lora_config(rank, None, name))
    bd_lora, sides = with_bd_lora(load_split(name), config, mesh, seed)
    counted = {
        "base model": count_collectives(load_split(name), batches[0]),
        "BD-LoRA, a block a rank": count_collectives(bd_lora, batches[0]),
        "plain LoRA by PEFT": count_collectives(plain, batches[0]),
    }
    del plain
    if first:
        print_collectives(counted)

    initial = gather(bd_lora, sides, mesh)
    losses = fine_tune(bd_lora, batches, learning_rate, quiet=not first)
    trained = gather(bd_lora, sides, mesh)
    dist.destroy_process_group()
    if not first:
        return
    save_adapter(output, config, trained)
    typer.echo(f"Loss {losses[0]:.3f} -> {losses[-1]:.3f} nats a token. {output}: {mesh.size()} blocks, rank {rank}.")
    if check:
        print_differences(
            (losses, trained), train_on_one_process(name, config, initial, batches, learning_rate), initial
        )
    typer.echo(f"bdlora launch --model {name} --tp {mesh.size()} --adapters {output}")


def start_ranks() -> DeviceMesh:
    """A mesh of all ranks: GPUs with NCCL, or processes on CPU cores with gloo."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return init_device_mesh(device, (int(os.environ["WORLD_SIZE"]),))


def on_rank_0_first(model: str | None) -> str:
    """`base_model`, which may have to be made, once."""
    if dist.get_rank() == 0:
        base_model(model)
    dist.barrier()
    return base_model(model)


def load_split(name: str) -> "PreTrainedModel":
    """The base model as transformers splits it over the ranks, by the plan of its architecture: ``tp_plan="auto"``."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    split = DistributedConfig(tp_size=dist.get_world_size(), tp_plan="auto")
    return AutoModelForCausalLM.from_pretrained(name, distributed_config=split, dtype="auto")


if __name__ == "__main__":
    run(main)
