"""PEFT's ``adapter_config.json``: reading, checking, and what it says of one module.

Source of the fields and of the matching rules: ``peft.LoraConfig``, ``peft.BdLoraConfig``,
``peft.utils.other.get_pattern_key``, ``peft.tuners.tuners_utils.check_target_module_exists`` (PEFT 0.21).
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from bdlora_sglang.errors import AdapterError

CONFIG_NAME = "adapter_config.json"

# Fields whose use changes what the adapter computes, and what each stands for. Other fields are about training or
# initialisation and do not matter to a trained adapter.
_UNSUPPORTED_FEATURES: dict[str, str] = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "lora_bias": "a bias in lora_B",
    "modules_to_save": "fully trained modules",
    "trainable_token_indices": "trainable tokens",
    "target_parameters": "LoRA on bare parameters (MoE experts)",
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


class BlockSide(Enum):
    """Which factor of a module is block-diagonal."""

    NONE = "plain"
    A = "block-diagonal A"  # row-parallel layers: o, down
    B = "block-diagonal B"  # column-parallel layers: q, k, v, gate, up


@dataclass(frozen=True)
class BDConfig:
    """``peft.BdLoraConfig``. A pattern matches a module when it is a substring of the module's name."""

    nblocks: int
    target_modules_bd_a: tuple[str, ...]
    target_modules_bd_b: tuple[str, ...]
    match_strict: bool

    @classmethod
    def from_dict(cls, raw: object, source: str) -> "BDConfig":
        if not isinstance(raw, Mapping):
            raise AdapterError(source, "field 'use_bdlora'", raw, "an object with 'nblocks', or null")
        check = _FieldReader(raw, source, prefix="use_bdlora.")
        return cls(
            nblocks=check.positive_int("nblocks", default=1),
            target_modules_bd_a=check.strings("target_modules_bd_a"),
            target_modules_bd_b=check.strings("target_modules_bd_b"),
            match_strict=check.boolean("match_strict", default=True),
        )

    def side(self, module: str, source: str) -> BlockSide:
        """The side that the patterns give ``module``; raises `AdapterError` where PEFT raises."""
        in_a = any(pattern in module for pattern in self.target_modules_bd_a)
        in_b = any(pattern in module for pattern in self.target_modules_bd_b)
        if in_a and in_b:
            raise AdapterError(
                source,
                f"module '{module}'",
                "a match in both use_bdlora.target_modules_bd_a and target_modules_bd_b",
                "a match in one of them",
            )
        if self.match_strict and not (in_a or in_b):
            raise AdapterError(
                source,
                f"module '{module}'",
                "no match in use_bdlora.target_modules_bd_a or target_modules_bd_b",
                "a match in one of them, or match_strict: false",
            )
        return BlockSide.A if in_a else BlockSide.B if in_b else BlockSide.NONE


@dataclass(frozen=True)
class AdapterConfig:
    """The fields of ``adapter_config.json`` that decide what the adapter computes.

    ``source`` is the name that messages give it; ``raw`` holds every field as it was read.
    """

    source: str
    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: str | tuple[str, ...]
    layers_to_transform: tuple[int, ...]
    layers_pattern: tuple[str, ...]
    bdlora: BDConfig | None
    raw: Mapping[str, Any] = field(repr=False)

    @classmethod
    def from_folder(cls, folder: Path) -> "AdapterConfig":
        """Read ``folder/adapter_config.json``; raises `AdapterError` when it is missing or not an object."""
        path = folder / CONFIG_NAME
        if not folder.is_dir():
            raise AdapterError(str(folder), "adapter", "no such folder", f"a folder with {CONFIG_NAME}")
        if not path.is_file():
            raise AdapterError(str(path), "adapter config", "no such file", "PEFT's adapter config")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise AdapterError(str(path), "adapter config", str(error), "a JSON object") from error
        return cls.from_dict(raw, str(path))

    @classmethod
    def from_dict(cls, raw: object, source: str) -> "AdapterConfig":
        """Check the fields; raises `AdapterError` for a type we do not know and for features we cannot serve."""
        if not isinstance(raw, Mapping):
            raise AdapterError(source, "adapter config", type(raw).__name__, "a JSON object")
        _refuse_unsupported(raw, source)
        check = _FieldReader(raw, source)
        bdlora = raw.get("use_bdlora")
        target_modules = raw.get("target_modules")
        return cls(
            source=source,
            r=check.positive_int("r"),
            lora_alpha=check.number("lora_alpha"),
            use_rslora=check.boolean("use_rslora", default=False),
            rank_pattern=check.mapping("rank_pattern", _FieldReader.positive_int),
            alpha_pattern=check.mapping("alpha_pattern", _FieldReader.number),
            target_modules=(
                check.pattern("target_modules", target_modules)
                if isinstance(target_modules, str)
                else check.strings("target_modules")
            ),
            layers_to_transform=check.integers("layers_to_transform"),
            layers_pattern=tuple(check.pattern("layers_pattern", item) for item in check.strings("layers_pattern")),
            bdlora=None if bdlora is None else BDConfig.from_dict(bdlora, source),
            raw=raw,
        )

    def rank(self, module: str) -> int:
        """The module's whole rank, all blocks together."""
        return self.rank_pattern.get(_pattern_key(self.rank_pattern, module), self.r)

    def alpha(self, module: str) -> float:
        return self.alpha_pattern.get(_pattern_key(self.alpha_pattern, module), self.lora_alpha)

    def scaling(self, module: str) -> float:
        """``alpha / r``, or ``alpha / sqrt(r)`` with rsLoRA; ``r`` is the whole rank (PEFT: ``LoraLayer.scaling``)."""
        rank = self.rank(module)
        return self.alpha(module) / (math.sqrt(rank) if self.use_rslora else rank)

    def side(self, module: str) -> BlockSide:
        return BlockSide.NONE if self.bdlora is None else self.bdlora.side(module, self.source)

    def targets(self, module: str) -> bool:
        """Whether PEFT puts LoRA on ``module`` (``check_target_module_exists``; "all-linear" targets everything)."""
        if isinstance(self.target_modules, str):
            return self.target_modules == "all-linear" or re.fullmatch(self.target_modules, module) is not None
        if module in self.target_modules:
            return True
        if not any(module.endswith(f".{target}") for target in self.target_modules):
            return False
        if not self.layers_to_transform:
            return True
        patterns = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in self.layers_pattern]
        matches = (re.match(pattern, module) for pattern in patterns or [r".*?\.[^.]*\.(?P<idx>\d+)\."])
        first = next((match for match in matches if match is not None), None)
        return first is not None and int(first["idx"]) in self.layers_to_transform


def _pattern_key(patterns: Mapping[str, Any], module: str) -> str:
    """The first pattern that matches the end of the module's name, else the name (PEFT: ``get_pattern_key``)."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), module)


def _refuse_unsupported(raw: Mapping[str, Any], source: str) -> None:
    peft_type = raw.get("peft_type")
    if str(peft_type).upper() != "LORA":
        raise AdapterError(source, "field 'peft_type'", repr(peft_type), "'LORA'")
    for name, feature in _UNSUPPORTED_FEATURES.items():
        if raw.get(name):
            raise AdapterError(source, f"field '{name}' ({feature})", raw[name], "null, false or absent: not supported")
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


@dataclass(frozen=True)
class _FieldReader:
    """Reads typed fields of a JSON object, with messages that name the field."""

    raw: Mapping[str, Any]
    source: str
    prefix: str = ""

    def _fail(self, name: str, expected: str) -> AdapterError:
        return AdapterError(self.source, f"field '{self.prefix}{name}'", repr(self.raw.get(name)), expected)

    def positive_int(self, name: str, default: int | None = None) -> int:
        value = self.raw.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self._fail(name, "an integer of at least 1")
        return value

    def number(self, name: str) -> float:
        value = self.raw.get(name)
        try:
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise self._fail(name, "a finite number")
        except OverflowError:  # an integer beyond the range of float
            raise self._fail(name, "a finite number") from None
        return value

    def boolean(self, name: str, default: bool) -> bool:
        value = self.raw.get(name, default)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._fail(name, "true or false")
        return value

    def strings(self, name: str) -> tuple[str, ...]:
        value = self.raw.get(name)
        if value is None:
            return ()
        value = [value] if isinstance(value, str) else sorted(value) if isinstance(value, set) else value
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise self._fail(name, "a list of strings")
        return tuple(value)

    def integers(self, name: str) -> tuple[int, ...]:
        value = self.raw.get(name)
        if value is None:
            return ()
        value = [value] if isinstance(value, int) else value
        if not isinstance(value, list | tuple) or not all(isinstance(item, int) for item in value):
            raise self._fail(name, "an integer or a list of integers")
        return tuple(value)

    def mapping(self, name: str, read: Callable[["_FieldReader", str], Any]) -> dict[str, Any]:
        value = self.raw.get(name) or {}
        if not isinstance(value, Mapping):
            raise self._fail(name, "an object")
        inner = _FieldReader(value, self.source, prefix=f"{self.prefix}{name}.")
        # Not sorted: PEFT takes the first pattern that matches.
        return {self.pattern(name, key): read(inner, key) for key in value}

    def pattern(self, name: str, value: str) -> str:
        """``value``, which stands in the field ``name``, if it is a regular expression."""
        try:
            re.compile(value)
        except re.error as error:
            raise self._fail(name, f"patterns that are regular expressions: {value!r}: {error}") from error
        return value
