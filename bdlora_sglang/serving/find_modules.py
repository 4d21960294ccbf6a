"""An adapter's modules in the base model, by their whole path."""

from bdlora_sglang.adapter import Adapter, LoRAModule
from bdlora_sglang.errors import AdapterError
from bdlora_sglang.serving.module_parts import ServedModule
from bdlora_sglang.serving.saved_weights import NOT_IN_BASE_MODEL
from bdlora_sglang.serving.served_modules import ServedModules, module_key


def find_modules(
    adapter: Adapter, served: ServedModules
) -> tuple[list[tuple[LoRAModule, tuple[ServedModule, ...]]], dict[str, str]]:
    """Each module with the parts of the base model that compute it, and the tensors for which there is no module.

    Raises:
        AdapterError: modules that are not served or that the language model does not have, two for the same one, other
            dimensions, or none that is found at all.
    """
    found: dict[str, tuple[LoRAModule, tuple[ServedModule, ...]]] = {}
    foreign: dict[str, str] = {}
    for module in adapter.modules.values():
        key = module_key(module.name)
        parts = served.parts.get(key)
        if parts is None:
            if served.reason(key) is not None or not served.is_foreign(key):
                raise _not_served(module, key, adapter, served)
            foreign |= {module.tensor_a: NOT_IN_BASE_MODEL, module.tensor_b: NOT_IN_BASE_MODEL}
            continue
        if key in found:
            other = found[key][0].name
            raise AdapterError(
                adapter.checkpoint.source, f"module '{module.name}'", f"the same module as '{other}'", "one of them"
            )
        _check_dimensions(module, parts[0], adapter)
        found[key] = module, parts
    if not found:
        raise _not_served(next(iter(adapter.modules.values())), "", adapter, served)
    return list(found.values()), foreign


def _not_served(module: LoRAModule, key: str, adapter: Adapter, served: ServedModules) -> AdapterError:
    reason = served.reason(key)
    kinds = sorted({key.rpartition(".")[2] for key in served.parts})
    layers = [int(key.split(".")[1]) for key in served.parts if key.startswith("layers.")]
    return AdapterError(
        adapter.checkpoint.source,
        f"module '{module.name}'",
        "no such parallel layer in the base model" if reason is None else f"a module that is not served: {reason}",
        f"one of {', '.join(kinds)} in layers 0 to {max(layers, default=0)}",
    )


def _check_dimensions(module: LoRAModule, part: ServedModule, adapter: Adapter) -> None:
    source = adapter.checkpoint.source
    if module.is_embedding != part.is_embedding:
        kinds = {True: "LoRA on an embedding", False: "LoRA on a linear module"}
        raise AdapterError(
            source, f"tensor '{module.tensor_a}'", kinds[module.is_embedding], f"{kinds[part.is_embedding]}"
        )
    for what, tensor, size, expected in (
        ("input features", module.tensor_a, module.in_features, part.in_features),
        ("output features", module.tensor_b, module.out_features, part.out_features),
    ):
        if size != expected:
            raise AdapterError(source, f"tensor '{tensor}' {what}", size, f"{expected}, as the base model has")
