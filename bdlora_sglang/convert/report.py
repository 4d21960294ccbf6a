"""What a conversion did, for the caller, the safetensors metadata and the model card."""

import json
import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bdlora_sglang.adapter import BlockSide
from bdlora_sglang.convert.truncate import Errors

METADATA_KEY = "bdlora_convert"
CARD_TITLE = "## BD-LoRA conversion"


@dataclass(frozen=True)
class ModuleReport:
    """One converted module. Ranks are whole ranks, all blocks together; errors belong to the delta without scaling."""

    name: str
    side: BlockSide
    nblocks: int
    source_rank: int
    rank: int
    source_parameters: int
    parameters: int
    scaling: float
    errors: Errors

    @property
    def error(self) -> float:
        """``||delta - delta'||_F / ||delta||_F``, as stored (rounding included); 0 for an exact conversion."""
        return _ratio(self.errors.error_sq, self.errors.norm_sq)

    @property
    def activation_error(self) -> float | None:
        """The same of the module's outputs over the calibration text; None without calibration."""
        return _optional_ratio(self.errors.activation_error_sq, self.errors.activation_norm_sq)


@dataclass(frozen=True)
class ConversionReport:
    """A finished conversion: the operation, its options, and what came of every module."""

    operation: str
    source: Path
    destination: Path
    options: Mapping[str, Any]
    modules: tuple[ModuleReport, ...]
    dtype: torch.dtype
    max_error: float | None = None

    @property
    def parameters(self) -> int:
        return sum(module.parameters for module in self.modules)

    @property
    def source_parameters(self) -> int:
        return sum(module.source_parameters for module in self.modules)

    @property
    def param_ratio(self) -> float:
        return self.parameters / self.source_parameters

    @property
    def error(self) -> float:
        """Relative Frobenius error of all deltas together, scaling included."""
        return _total(self.modules, "error_sq", "norm_sq") or 0.0

    @property
    def activation_error(self) -> float | None:
        """Relative error of all modules' outputs over the calibration text; None without calibration."""
        return _total(self.modules, "activation_error_sq", "activation_norm_sq")

    @property
    def uncalibrated_activation_error(self) -> float | None:
        """The activation error that the same ranks would have had without calibration."""
        return _total(self.modules, "uncalibrated_activation_error_sq", "activation_norm_sq")

    @property
    def above_max_error(self) -> tuple[str, ...]:
        """Modules that stayed above --max-error, because of the budget or of the rounding to the stored type."""
        if self.max_error is None:
            return ()
        errors = {m.name: m.error if m.activation_error is None else m.activation_error for m in self.modules}
        return tuple(name for name, error in errors.items() if error > self.max_error)

    def metadata(self) -> dict[str, str]:
        """The entry of the safetensors metadata: JSON under `METADATA_KEY`. Nothing in it depends on time or place."""
        record = {
            "operation": self.operation,
            "source": self.source.absolute().name,
            "options": dict(self.options),
            "parameters": self.parameters,
            "source_parameters": self.source_parameters,
            "error": _short(self.error),
            "activation_error": _short(self.activation_error),
            "module_errors": {m.name: [_short(m.error), _short(m.activation_error)] for m in self.modules},
            "versions": versions(),
        }
        return {METADATA_KEY: json.dumps(record, sort_keys=True, separators=(",", ":"))}

    def model_card_section(self) -> str:
        """The section that is appended to the adapter's README.md."""
        ranks = sorted({module.rank for module in self.modules})
        worst = max(self.modules, key=lambda module: module.error)
        made_with = ", ".join(f"{package} {number}" for package, number in versions().items())
        lines = [
            CARD_TITLE,
            "",
            f"Made from `{self.source.absolute().name}` by `bdlora convert {self.operation}` ({made_with}).",
            "",
            f"- options: {', '.join(f'{key}={value}' for key, value in self.options.items()) or 'none'}",
            f"- rank: {ranks[0]}" + (f" to {ranks[-1]}, by module" if len(ranks) > 1 else ""),
            f"- parameters: {self.parameters:,} ({self.param_ratio:.4f} of the source's {self.source_parameters:,})",
            f"- relative Frobenius error of the deltas: {self.error:.3e} (largest: {worst.error:.3e}, `{worst.name}`)",
        ]
        if self.activation_error is not None and self.uncalibrated_activation_error is not None:
            lines.append(
                f"- relative error on the calibration text's activations: {self.activation_error:.3e} "
                f"(without calibration {self.uncalibrated_activation_error:.3e})"
            )
        return "\n".join(lines) + "\n"


def versions() -> dict[str, str]:
    try:
        own = version("bdlora-sglang")
    except PackageNotFoundError:
        own = "unknown"
    return {
        "bdlora-sglang": own,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _short(value: float | None) -> str | None:
    return None if value is None else f"{value:.6e}"


def _total(modules: tuple[ModuleReport, ...], error: str, norm: str) -> float | None:
    """Over the modules that have both, weighted by their scaling."""
    pairs = [(m.scaling**2, getattr(m.errors, error), getattr(m.errors, norm)) for m in modules]
    known = [(scale * e, scale * n) for scale, e, n in pairs if e is not None and n is not None]
    return _ratio(sum(e for e, _ in known), sum(n for _, n in known)) if known else None


def _optional_ratio(error_sq: float | None, norm_sq: float | None) -> float | None:
    return None if error_sq is None or norm_sq is None else _ratio(error_sq, norm_sq)


def _ratio(error_sq: float, norm_sq: float) -> float:
    """The error of a delta that is zero counts as zero when it stays zero."""
    if norm_sq == 0:
        return 0.0 if error_sq == 0 else math.inf
    return math.sqrt(error_sq / norm_sq)
