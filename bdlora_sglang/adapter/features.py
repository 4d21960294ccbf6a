"""What an adapter's config may ask for and nobody here computes: each is refused by its name."""

from collections.abc import Mapping
from typing import Any

from bdlora_sglang.errors import AdapterError

# Fields whose use changes what the adapter computes, and what each stands for. Other fields are about training or
# initialisation and do not matter to a trained adapter.
_UNSUPPORTED_FEATURES: dict[str, str] = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "lora_bias": "a bias in lora_B",
    "trainable_token_indices": "trainable tokens",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "layer replication",
    "megatron_config": "Megatron layers",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}

# Starts of the `init_lora_weights` with which PEFT changes the base weights, again at every load. PEFT can save such an
# adapter as plain LoRA, and then writes true.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq")

_KNOWN_VARIANTS = {"use_rslora", "use_bdlora", *(name for name in _UNSUPPORTED_FEATURES if name.startswith("use_"))}


def refuse_unsupported(raw: Mapping[str, Any], source: str) -> None:
    """Raise `AdapterError` for another kind of adapter than LoRA, and for variants of LoRA that are not computed."""
    peft_type = raw.get("peft_type")
    if str(peft_type).upper() != "LORA":
        raise AdapterError(source, "field 'peft_type'", repr(peft_type), "'LORA'")
    for name, feature in _UNSUPPORTED_FEATURES.items():
        # An empty object asks PEFT for the feature with its default values.
        if raw.get(name) or raw.get(name) == {}:
            raise AdapterError(source, f"field '{name}' ({feature})", raw[name], "null, false or absent: not supported")
    if raw.get("target_parameters") and raw.get("use_bdlora"):
        raise AdapterError(source, "field 'target_parameters'", "use_bdlora, too", "one of them: PEFT has no such")
    if raw.get("bias", "none") != "none":
        raise AdapterError(source, "field 'bias' (trained biases)", repr(raw["bias"]), "'none': others not supported")
    init = raw.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        raise AdapterError(
            source,
            "field 'init_lora_weights' (an initialisation that changes the base model)",
            repr(init),
            "true: save the adapter with PEFT's path_initial_model_for_weight_conversion",
        )
    for name, value in raw.items():
        if name.startswith("use_") and value and name not in _KNOWN_VARIANTS:
            raise AdapterError(source, f"field '{name}' (an unknown LoRA variant)", value, "null, false or absent")
