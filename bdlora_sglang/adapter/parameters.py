"""PEFT's ``target_parameters``: LoRA on bare parameters, such as the weights of all experts of an MoE layer in one.

Source: ``peft.tuners.lora.layer.ParamWrapper`` and ``peft.tuners.tuners_utils.BaseTuner._inject_parameters`` (PEFT
0.21). Of a parameter with the weights of E experts, A is ``(E * rank, in)`` with the rows of one expert after those of
another, and B is ``(out, rank * E)`` with the columns of one rank after those of another.
"""

from collections.abc import Sequence

from bdlora_sglang.errors import AdapterError

# Those of all experts, in the order in which the modules of transformers have them.
EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")
_EXPERTS = "experts"
_WRAPPED = ".base_layer"


def check_parameters(targets: Sequence[str], source: str) -> None:
    """Raise `AdapterError` for a name of another parameter than the ones that are known."""
    for target in targets:
        if target.rpartition(".")[2] not in (*EXPERT_PARAMETERS, "weight"):
            expected = f"the 'weight' of a linear module, or {' or '.join(EXPERT_PARAMETERS)} of experts"
            raise AdapterError(source, "field 'target_parameters'", repr(target), expected)


def targeted_parameter(module: str, targets: Sequence[str]) -> str | None:
    """The name of the parameter that the LoRA of ``module`` is for; None where ``targets`` name none of its own.

    PEFT wraps a module once for each of its targeted parameters, in their order, so that an adapter has the last one's
    LoRA under the module's name, and those before it under ``base_layer`` of what is around them.
    """
    holder, around = module, 0
    while holder.endswith(_WRAPPED):
        holder, around = holder.removesuffix(_WRAPPED), around + 1
    known = EXPERT_PARAMETERS if holder.rpartition(".")[2] == _EXPERTS else ("weight",)
    found = [name for name in known if any(f".{holder}.{name}".endswith(f".{target}") for target in targets)]
    return f"{holder}.{found[-1 - around]}" if around < len(found) else None
