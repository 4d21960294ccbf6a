"""BD-LoRA on a model that tensor parallelism splits: on each rank, PEFT's plain LoRA on this rank's own shard.

Of N blocks on N ranks, block p meets the weights of rank p and no others. So each rank trains a LoRA of rank r/N on its
shard, which no other rank needs to know of, and what the base layers exchange carries LoRA along:

- column-parallel: nothing in the forward, in the backward one all-reduce of the input's gradient, base + LoRA;
- row-parallel: in the forward one all-reduce of the output, base + LoRA, nothing in the backward.
"""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from bdlora_sglang.convert import TPSide
from bdlora_sglang.errors import BDLoRAError

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel


def with_bd_lora(
    base: "PreTrainedModel", config: "LoraConfig", mesh: DeviceMesh, seed: int
) -> "tuple[PeftModel, dict[str, TPSide]]":
    """Give a model loaded with ``tp_plan="auto"`` this rank's blocks of a BD-LoRA.

    Args:
        base: changed in place.
        config: of the whole BD-LoRA, with a block for each rank.
        mesh: of the ranks.
        seed: of the initial values; each rank draws others.

    Returns:
        The model, and how each layer with LoRA is split, for `gather`.
    """
    from peft import get_peft_model

    from bdlora_perf.quality.init import initialise_like_lora

    sides = take_shards(base, config.target_modules)
    model = get_peft_model(base, local_config(config, mesh.size()))
    initialise_like_lora(model, seed * mesh.size() + mesh.get_local_rank())
    add_collectives(model, sides, mesh)
    return model, sides


def take_shards(model: "PreTrainedModel", targets: Collection[str]) -> dict[str, TPSide]:
    """Make the target layers of a model loaded with ``tp_plan="auto"`` plain linear layers over this rank's shard.

    transformers' own forwards of these layers go, and with them their collectives: `add_collectives` puts those around
    the layers with LoRA.

    Args:
        model: changed in place; weights are shared, not copied.
        targets: the last parts of the layers' names.

    Raises:
        BDLoRAError: a target that is not split, or not evenly.
    """
    sides = {}
    for name, layer in list(model.named_modules()):
        if name.rpartition(".")[2] in targets:
            sides[name] = _side(name, layer.weight)
            model.set_submodule(name, _local(layer, sides[name]))
    if not sides:
        raise BDLoRAError(f"model: found no layer named {', '.join(sorted(targets))}, expected at least one")
    model.tp_plan = {}  # by which PEFT would split factors that belong to a shard already
    return sides


def _side(name: str, weight: torch.Tensor) -> TPSide:
    sides = {(Shard(0),): TPSide.COLUMN, (Shard(1),): TPSide.ROW}
    if not isinstance(weight, DTensor) or weight.placements not in sides:
        found = weight.placements if isinstance(weight, DTensor) else "whole"
        raise BDLoRAError(f"{name}: found weights placed as {found}, expected split over the rows or the columns")
    side = sides[weight.placements]
    features, ranks = weight.shape[0 if side is TPSide.COLUMN else 1], weight.device_mesh.size()
    if features % ranks:
        raise BDLoRAError(f"{name}: found {features} features to split, expected a multiple of {ranks} ranks")
    return side


def _local(layer: nn.Linear, side: TPSide) -> nn.Linear:
    """A plain layer with this rank's weights. A row-parallel layer's bias is rank 0's, so that it is added once."""
    weight = _shard(layer.weight)
    has_bias = layer.bias is not None and (side is TPSide.COLUMN or dist.get_rank() == 0)
    local = nn.Linear(weight.shape[1], weight.shape[0], bias=has_bias, device="meta")
    local.weight = weight
    if has_bias:
        local.bias = _shard(layer.bias)
    return local


def _shard(weight: torch.Tensor) -> nn.Parameter:
    assert isinstance(weight, DTensor)
    return nn.Parameter(weight.to_local().detach(), requires_grad=False)


def local_config(config: "LoraConfig", ranks: int) -> "LoraConfig":
    """One block of a BD-LoRA, which is a plain LoRA of the same scaling."""
    from peft import LoraConfig

    if config.r % ranks:
        raise BDLoRAError(f"--rank: found {config.r}, expected a multiple of {ranks} ranks")
    return LoraConfig(
        r=config.r // ranks,
        lora_alpha=config.lora_alpha / ranks,
        target_modules=config.target_modules,
        task_type=config.task_type,
    )


def add_collectives(model: "PeftModel", sides: Mapping[str, TPSide], mesh: DeviceMesh) -> None:
    """Put the base layers' collectives around the layers with LoRA: the sum of both is exchanged, once."""

    def split_input(_layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Every rank has the whole input, and a part of its gradient."""
        shared = DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False)
        return shared.to_local(grad_placements=[Partial()]), *inputs[1:]

    def sum_output(_layer: nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        """Every rank has a part of the sum, and needs all of it."""
        partial = DTensor.from_local(output, mesh, [Partial()], run_check=False)
        return partial.redistribute(placements=[Replicate()]).to_local()

    for name, side in sides.items():
        layer = model.get_base_model().get_submodule(name)
        if side is TPSide.COLUMN:
            layer.register_forward_pre_hook(split_input)
        else:
            layer.register_forward_hook(sum_output)


def gather(model: "PeftModel", sides: Mapping[str, TPSide], mesh: DeviceMesh) -> dict[str, torch.Tensor]:
    """The blocks of all ranks, packed as PEFT packs them and by PEFT's names; all ranks must call this.

    Returns:
        ``lora_A.weight`` (r, in) and ``lora_B.weight`` (out, r/N) of a column-parallel layer, (r, in/N) and (out, r) of
        a row-parallel one; on the CPU, the same on every rank.
    """
    from peft import get_peft_model_state_dict

    tensors = {}
    for key, block in sorted(get_peft_model_state_dict(model).items()):
        name, _, factor = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        # PEFT packs blocks below one another, but for a row-parallel layer's B, whose blocks stand side by side.
        dim = 1 if factor == "B" and sides[name] is TPSide.ROW else 0
        tensors[key] = DTensor.from_local(block, mesh, [Shard(dim)], run_check=False).full_tensor().cpu()
    return tensors
