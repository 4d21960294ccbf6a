"""An adapter's tensors, sorted out by their names: pairs of factors, weights saved along, and those without a use."""

from collections.abc import Mapping
from dataclasses import dataclass

from bdlora_sglang.adapter.checkpoint import Checkpoint
from bdlora_sglang.adapter.config import AdapterConfig
from bdlora_sglang.adapter.names import TensorKind, TensorName, parse_tensor_name
from bdlora_sglang.adapter.parameters import targeted_parameter
from bdlora_sglang.errors import AdapterError

NOT_TARGETED = "its module is not among the config's target_modules"
_MOST_LISTED = 20


@dataclass(frozen=True)
class Tensors:
    """``pairs`` are A and B by module; ``embeddings`` are those of these modules that are embeddings.

    ``parameters`` are those that the LoRA of a module is for, where it is for one (`targeted_parameter`). ``saved`` and
    ``ignored`` are as in `Adapter`.
    """

    pairs: Mapping[str, tuple[str, str]]
    embeddings: frozenset[str]
    parameters: Mapping[str, str]
    saved: Mapping[str, str]
    ignored: Mapping[str, str]

    @classmethod
    def sorted_out(cls, checkpoint: Checkpoint, config: AdapterConfig) -> "Tensors":
        """Raises `AdapterError`, which lists all tensors that it is about."""
        factors: dict[str, dict[str, str]] = {}
        embeddings: set[str] = set()
        saved: dict[str, str] = {}
        unsupported: list[str] = []
        for tensor in sorted(checkpoint.names()):
            parsed = _parsed(tensor, checkpoint, config)
            if parsed.kind is TensorKind.UNSUPPORTED:
                unsupported.append(tensor)
                continue
            known = saved if parsed.kind is TensorKind.PARAMETER else factors.setdefault(parsed.name, {})
            key = parsed.name if parsed.kind is TensorKind.PARAMETER else parsed.factor
            if key in known:
                subject = f"tensor '{tensor}'"
                raise AdapterError(checkpoint.source, subject, f"a duplicate of '{known[key]}'", "one of them")
            known[key] = tensor
            if parsed.kind is TensorKind.EMBEDDING:
                embeddings.add(parsed.name)
        if unsupported:
            raise AdapterError(
                checkpoint.source,
                tensors_subject(unsupported),
                "tensors that are not LoRA on a linear module or an embedding",
                "'<module>.lora_A.weight' or '<module>.lora_B.weight' (no DoRA, bias or trained tokens)",
            )
        pairs = {module: _pair(module, names, checkpoint) for module, names in factors.items()}
        targeted = {module: config.adapts(module, module not in embeddings) for module in pairs}
        parameters = {
            module: parameter
            for module in pairs
            if not targeted[module] and (parameter := targeted_parameter(module, config.parameters)) is not None
        }
        targeted.update(dict.fromkeys(parameters, True))
        _check_saved_modules(saved, checkpoint, config)
        ignored = {tensor: NOT_TARGETED for module, pair in pairs.items() if not targeted[module] for tensor in pair}
        pairs = {module: pair for module, pair in pairs.items() if targeted[module]}
        return cls(pairs, frozenset(embeddings), parameters, saved, ignored)


def refuse_ignored(ignored: Mapping[str, str], source: str) -> None:
    """For strict loading: raise `AdapterError` for tensors without a use, all of them at once."""
    if ignored:
        reasons = "; ".join(sorted(set(ignored.values())))
        raise AdapterError(
            source, tensors_subject(ignored), f"tensors without a use ({reasons})", "none with strict loading"
        )


def _parsed(tensor: str, checkpoint: Checkpoint, config: AdapterConfig) -> TensorName:
    if not tensor.isprintable():
        raise AdapterError(checkpoint.source, f"tensor {tensor!r}", "characters that are not printable", "a name")
    return parse_tensor_name(tensor, config.has_head)


def _pair(module: str, names: Mapping[str, str], checkpoint: Checkpoint) -> tuple[str, str]:
    if len(names) != 2:
        missing = "B" if "A" in names else "A"
        raise AdapterError(checkpoint.source, f"module '{module}'", f"no lora_{missing}.weight", "both factors")
    return names["A"], names["B"]


def _check_saved_modules(saved: Mapping[str, str], checkpoint: Checkpoint, config: AdapterConfig) -> None:
    """PEFT does not load an adapter without the modules that its config says were saved."""
    targets = config.targets
    for module in targets.modules_to_save:
        pattern = rf"(^|.*\.){module}($|\..*)"
        if not any(targets.matcher.match(pattern, name) for name in saved):
            raise AdapterError(
                config.source, f"field 'modules_to_save' ('{module}')", f"no such tensor in {checkpoint.source}", "one"
            )


def tensors_subject(names: Mapping[str, str] | list[str]) -> str:
    """What a message calls tensors: all of their names, but for those beyond the twentieth."""
    listed = [f"'{name}'" for name in list(names)[:_MOST_LISTED]]
    more = len(names) - len(listed)
    return f"tensor{'s' if len(names) > 1 else ''} {', '.join(listed)}{f' and {more} more' if more else ''}"
