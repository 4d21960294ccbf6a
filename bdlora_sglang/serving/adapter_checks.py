"""All adapters given at the start, checked before any process is spawned: every fault of every one at once."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import track
from sglang.srt.arg_groups.overrides import declare_resolution, model_config_of, resolving_view
from sglang.srt.server_args import ServerArgs
from transformers import AutoConfig, AutoModelForCausalLM

from bdlora_sglang.adapter import Adapter
from bdlora_sglang.adapter.locate import NamedAdapter, adapter_folder
from bdlora_sglang.errors import BDLoRAError
from bdlora_sglang.serving.served_modules import module_key

logger = logging.getLogger(__name__)

_READERS = 4
_MANY = 20  # from here on progress is shown


@dataclass(frozen=True)
class Fault:
    adapter: NamedAdapter
    reason: str


def check_adapters(server_args: ServerArgs, skip_bad: bool) -> list[Fault]:
    """Check the adapters of ``--lora-paths``, and with ``skip_bad`` leave the bad ones out.

    Args:
        server_args: resolved, and not yet published.
        skip_bad: start without those that have a fault, rather than not at all.

    Returns:
        The faults of those left out.

    Raises:
        BDLoRAError: faults, or none that is left; one line for each adapter.
    """
    given = list(named_adapters(resolving_view(server_args).lora_paths))
    shapes = base_shapes(server_args)
    model_type = model_config_of(server_args).hf_text_config.model_type
    # A thread waits for the disk and for torch, both without Python's lock.
    with ThreadPoolExecutor(_READERS) as readers:
        reasons: Iterable[str | None] = readers.map(lambda adapter: _fault(adapter, shapes, model_type), given)
        if len(given) >= _MANY:
            reasons = track(reasons, "Checking adapters", total=len(given))
        faults = [Fault(adapter, reason) for adapter, reason in zip(given, reasons, strict=True) if reason]
    if not faults:
        return []
    good = [adapter for adapter in given if adapter not in {fault.adapter for fault in faults}]
    if not skip_bad or not good:
        listed = "\n".join(f"  {fault.adapter.name}: {fault.reason}" for fault in faults)
        hint = "" if skip_bad else "; --skip-bad-adapters starts without them"
        raise BDLoRAError(f"{listed}\n{len(faults)} of {len(given)} adapters cannot be served, as listed above{hint}")
    paths = [item for item, adapter in zip(_items(server_args), given, strict=True) if adapter in good]
    declare_resolution(server_args, "bdlora_sglang", lora_paths=paths)
    return faults


def named_adapters(lora_paths: Any) -> Iterator[NamedAdapter]:
    """Adapters in any of the forms that SGLang takes: ``name=path``, a path, a mapping for each, or one for all."""
    for item in _as_list(lora_paths):
        if isinstance(item, Mapping):
            yield NamedAdapter(item["lora_name"], item["lora_path"])
        elif isinstance(item, str):
            name, separator, path = item.partition("=")
            yield NamedAdapter(name, path if separator else name)
        else:
            yield NamedAdapter(item.lora_name, item.lora_path)


def _items(server_args: ServerArgs) -> list[Any]:
    return _as_list(resolving_view(server_args).lora_paths)


def _as_list(lora_paths: Any) -> list[Any]:
    if isinstance(lora_paths, Mapping):
        return [f"{name}={path}" for name, path in lora_paths.items()]
    return list(lora_paths or ())


def base_shapes(server_args: ServerArgs) -> dict[str, tuple[int, int]]:
    """Output and input features of each linear module, by `module_key`, in transformers' own model: PEFT's names.

    Empty for models that transformers does not build as a causal language model: those are left to the ranks, which
    check every adapter against the layers that they have.
    """
    resolved = resolving_view(server_args)
    try:
        config = AutoConfig.from_pretrained(resolved.model_path, revision=resolved.revision)
        if hasattr(config, "text_config"):
            return {}  # vision layers have numbers, too
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    # Any model may have a way of its own to fail without weights, and none may keep the server from starting.
    except Exception as error:
        logger.info(f"Adapters are checked against the base model when it is loaded: {error}")
        return {}
    return {
        module_key(name): (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


def _fault(adapter: NamedAdapter, shapes: Mapping[str, tuple[int, int]], model_type: str) -> str | None:
    try:
        opened = Adapter.open(adapter_folder(adapter.path), model_type)
        _check_shapes(opened, shapes)
        # One tensor may hold the factors of many experts.
        modules = opened.modules.values()
        for tensor in dict.fromkeys(name for module in modules for name in (module.tensor_a, module.tensor_b)):
            rows, columns = opened.checkpoint.shape(tensor)
            opened.checkpoint.read(tensor, range(rows), range(columns))
    except (BDLoRAError, OSError) as error:
        return str(error)
    return None


def _check_shapes(adapter: Adapter, shapes: Mapping[str, tuple[int, int]]) -> None:
    for module in adapter.modules.values():
        found, expected = (module.out_features, module.in_features), shapes.get(module_key(module.name))
        if expected is not None and found != expected:
            raise BDLoRAError(
                f"{adapter.checkpoint.source}: module '{module.name}': found {found[0]} output and {found[1]} input "
                f"features, expected {expected[0]} and {expected[1]}, as the base model has"
            )
