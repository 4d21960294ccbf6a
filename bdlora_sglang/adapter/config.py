"""PEFT's ``adapter_config.json``: reading, checking, and what it says of one module.

Source of the fields: ``peft.LoraConfig``, ``peft.BdLoraConfig`` (PEFT 0.21).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from bdlora_sglang.adapter.features import refuse_unsupported
from bdlora_sglang.adapter.fields import FieldReader
from bdlora_sglang.adapter.json_file import read_json
from bdlora_sglang.adapter.parameters import check_parameters
from bdlora_sglang.adapter.patterns import Matcher, PatternTable
from bdlora_sglang.adapter.targets import TargetModules
from bdlora_sglang.errors import AdapterError

CONFIG_NAME = "adapter_config.json"

# Patterns of ``use_bdlora`` are compared with every module.
_MOST_SIDE_PATTERNS = 10_000

# Task types whose models have a head, with the decoder below ``model``.
_TASKS_WITH_HEAD = {"CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"}


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
        fields = FieldReader(raw, source, prefix="use_bdlora.")
        config = cls(
            nblocks=fields.positive_int("nblocks", default=1),
            target_modules_bd_a=fields.strings("target_modules_bd_a"),
            target_modules_bd_b=fields.strings("target_modules_bd_b"),
            match_strict=fields.boolean("match_strict", default=True),
        )
        patterns = len(config.target_modules_bd_a) + len(config.target_modules_bd_b)
        if patterns > _MOST_SIDE_PATTERNS:
            raise AdapterError(source, "field 'use_bdlora'", f"{patterns} patterns", f"at most {_MOST_SIDE_PATTERNS}")
        return config

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

    ``source`` is the name that messages give it; ``raw`` holds every field as it was read. ``model_type`` is that of
    the base model, where it is known: PEFT's default targets depend on it. ``parameters`` are ``target_parameters``.
    """

    source: str
    r: int
    lora_alpha: float
    use_rslora: bool
    targets: TargetModules
    parameters: tuple[str, ...]
    bdlora: BDConfig | None
    model_type: str | None
    raw: Mapping[str, Any] = field(repr=False)
    _ranks: PatternTable[int] = field(repr=False)
    _alphas: PatternTable[float] = field(repr=False)

    @classmethod
    def from_folder(cls, folder: Path, model_type: str | None = None) -> "AdapterConfig":
        """Read ``folder/adapter_config.json``; raises `AdapterError` when it is missing, too large or not an object."""
        path = folder / CONFIG_NAME
        if not folder.is_dir():
            raise AdapterError(str(folder), "adapter", "no such folder", f"a folder with {CONFIG_NAME}")
        if not path.is_file():
            raise AdapterError(str(path), "adapter config", "no such file", "PEFT's adapter config")
        return cls.from_dict(read_json(path, "adapter config"), str(path), model_type)

    @classmethod
    def from_dict(cls, raw: object, source: str, model_type: str | None = None) -> "AdapterConfig":
        """Check the fields; raises `AdapterError` for a type we do not know and for features we cannot serve."""
        if not isinstance(raw, Mapping):
            raise AdapterError(source, "adapter config", type(raw).__name__, "a JSON object")
        refuse_unsupported(raw, source)
        fields, matcher = FieldReader(raw, source), Matcher(source)
        bdlora = raw.get("use_bdlora")
        ranks = fields.mapping("rank_pattern", FieldReader.positive_int)
        alphas = fields.mapping("alpha_pattern", FieldReader.number)
        parameters = fields.strings("target_parameters")
        check_parameters(parameters, source)
        for name, patterns in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
            for pattern in patterns:
                matcher.check(name, pattern)
        return cls(
            source=source,
            r=fields.positive_int("r"),
            lora_alpha=fields.number("lora_alpha"),
            use_rslora=fields.boolean("use_rslora", default=False),
            targets=TargetModules.from_fields(fields, matcher),
            parameters=parameters,
            bdlora=None if bdlora is None else BDConfig.from_dict(bdlora, source),
            model_type=model_type,
            raw=raw,
            _ranks=PatternTable(ranks, matcher),
            _alphas=PatternTable(alphas, matcher),
        )

    @property
    def target_modules(self) -> str | list[str]:
        """What ``target_modules`` says, or stands for where it says nothing."""
        names = self.targets.names(self.model_type)
        return names if isinstance(names, str) else sorted(names)

    @property
    def has_head(self) -> bool:
        """Whether the base model is known to be one with a head, whose layers are below ``model``."""
        mapping = self.raw.get("auto_mapping")
        base_class = mapping.get("base_model_class") if isinstance(mapping, Mapping) else None
        return str(self.raw.get("task_type")).upper() in _TASKS_WITH_HEAD or str(base_class).endswith("ForCausalLM")

    def rank(self, module: str) -> int:
        """The module's whole rank, all blocks together."""
        return self._ranks.get(module, self.r)

    def alpha(self, module: str) -> float:
        return self._alphas.get(module, self.lora_alpha)

    def scaling(self, module: str) -> float:
        """``alpha / r``, or ``alpha / sqrt(r)`` with rsLoRA; ``r`` is the whole rank (PEFT: ``LoraLayer.scaling``)."""
        rank = self.rank(module)
        return self.alpha(module) / (math.sqrt(rank) if self.use_rslora else rank)

    def side(self, module: str) -> BlockSide:
        return BlockSide.NONE if self.bdlora is None else self.bdlora.side(module, self.source)

    def adapts(self, module: str, is_linear: bool = True) -> bool:
        """Whether PEFT puts LoRA on ``module``; raises `AdapterError` when the patterns take too long."""
        return self.targets.match(module, is_linear, self.model_type)
