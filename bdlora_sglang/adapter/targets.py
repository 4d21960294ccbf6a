"""Which modules PEFT puts LoRA on.

Source: ``peft.tuners.tuners_utils.check_target_module_exists``, ``_maybe_include_all_linear_layers`` and
``peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING`` (PEFT 0.21).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bdlora_sglang.adapter.fields import FieldReader
from bdlora_sglang.adapter.patterns import Matcher

ALL_LINEAR = "all-linear"

# PEFT's targets where a config names none, by the base model's type: of those with linear modules.
DEFAULT_TARGETS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("llama", "llama4", "mistral", "mixtral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"),
        ("q_proj", "v_proj"),
    ),
    **dict.fromkeys(("opt", "gptj", "gpt_neo", "stablelm", "bart"), ("q_proj", "v_proj")),
    **dict.fromkeys(("bloom", "gpt_neox", "chatglm", "RefinedWebModel", "RefinedWeb", "falcon"), ("query_key_value",)),
    **dict.fromkeys(("t5", "mt5"), ("q", "v")),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "mpt": ("Wqkv",),
    "codegen": ("qkv_proj",),
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
}


@dataclass(frozen=True)
class TargetModules:
    """The fields of a config that choose modules.

    ``include`` is a regular expression, names and ends of names, or None for all of the base model's own default;
    ``exclude`` is the same. ``modules_to_save`` are trained as a whole and have no LoRA.
    """

    include: str | frozenset[str] | None
    exclude: str | frozenset[str]
    modules_to_save: tuple[str, ...]
    layers_to_transform: tuple[int, ...]
    layers_pattern: tuple[str, ...]
    matcher: Matcher

    @classmethod
    def from_fields(cls, fields: FieldReader, matcher: Matcher) -> "TargetModules":
        """Raises `AdapterError` for fields of another type and for patterns that are none."""
        include = fields.raw.get("target_modules")
        exclude = fields.raw.get("exclude_modules")
        if include is not None:
            include = _expression_or_names("target_modules", fields, matcher)
        return cls(
            include=include,
            exclude=frozenset() if exclude is None else _expression_or_names("exclude_modules", fields, matcher),
            modules_to_save=_expressions("modules_to_save", fields, matcher),
            layers_to_transform=fields.integers("layers_to_transform"),
            layers_pattern=_expressions("layers_pattern", fields, matcher),
            matcher=matcher,
        )

    def names(self, model_type: str | None) -> str | frozenset[str]:
        """``include``, or PEFT's default for ``model_type``; ``all-linear`` where neither is known."""
        if self.include is not None:
            return self.include
        default = DEFAULT_TARGETS.get(model_type or "")
        return ALL_LINEAR if default is None else frozenset(default)

    def match(self, module: str, is_linear: bool, model_type: str | None) -> bool:
        """Whether PEFT puts LoRA on ``module``; raises `AdapterError` when the patterns take too long."""
        if self._among(self.exclude, module) or self._is_saved(module):
            return False
        names = self.names(model_type)
        if isinstance(names, str):
            if names.lower() == ALL_LINEAR:
                return is_linear and module.rpartition(".")[2] != "lm_head"
            return self._among(names, module)
        if module in names:
            return True
        return self._among(names, module) and (not self.layers_to_transform or self._layer_is_chosen(module))

    def _among(self, expression_or_names: str | frozenset[str], module: str) -> bool:
        if isinstance(expression_or_names, str):
            return bool(expression_or_names) and self.matcher.fullmatch(expression_or_names, module) is not None
        ends = {module, *(module[place + 1 :] for place, character in enumerate(module) if character == ".")}
        return not ends.isdisjoint(expression_or_names)

    def _is_saved(self, module: str) -> bool:
        return any(self.matcher.match(rf"(^|.*\.){saved}($|\..*)", module) for saved in self.modules_to_save)

    def _layer_is_chosen(self, module: str) -> bool:
        patterns = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in self.layers_pattern]
        matches = (self.matcher.match(pattern, module) for pattern in patterns or [r".*?\.[^.]*\.(?P<idx>\d+)\."])
        first = next((match for match in matches if match is not None), None)
        return first is not None and int(first["idx"]) in self.layers_to_transform


def _expression_or_names(name: str, fields: FieldReader, matcher: Matcher) -> str | frozenset[str]:
    value: Any = fields.raw[name]
    return matcher.check(name, value) if isinstance(value, str) else frozenset(fields.strings(name))


def _expressions(name: str, fields: FieldReader, matcher: Matcher) -> tuple[str, ...]:
    return tuple(matcher.check(name, expression) for expression in fields.strings(name))
