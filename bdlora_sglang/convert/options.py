"""The choices of a conversion, checked."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bdlora_sglang.errors import BDLoRAError

DTYPES: Mapping[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class RankChoice:
    """How the new rank is chosen; at most one of ``rank`` and ``param_ratio``. All None: exact, no approximation.

    Attributes:
        rank: the whole rank of every module, all blocks together; a module whose exact rank is smaller keeps that.
        param_ratio: parameters of the adapter over the source's. Up to 0.005 more counts as met, as ratios are quoted
            with two decimals: 0.87 and 1.74 give 2 and 4 times the source's rank at 8 blocks.
        max_error: per module, the largest relative Frobenius error (of the activations, with calibration); every
            module gets the smallest rank that keeps it. With ``rank`` or ``param_ratio`` these are a budget of
            parameters, spent where it lowers the summed error most.
    """

    rank: int | None = None
    param_ratio: float | None = None
    max_error: float | None = None

    @property
    def exact(self) -> bool:
        return self.rank is None and self.param_ratio is None and self.max_error is None

    def check(self, nblocks: int) -> None:
        """Raises `BDLoRAError` for values that mean nothing, or a rank that ``nblocks`` does not divide."""
        if self.rank is not None and self.param_ratio is not None:
            raise BDLoRAError("--rank and --param-ratio: found both, expected one of them")
        if self.rank is not None and (self.rank < 1 or self.rank % nblocks):
            raise BDLoRAError(f"--rank: found {self.rank}, expected a positive multiple of {nblocks} blocks")
        if self.param_ratio is not None and not 0 < self.param_ratio < float("inf"):
            raise BDLoRAError(f"--param-ratio: found {self.param_ratio}, expected a positive number")
        if self.max_error is not None and not 0 <= self.max_error < 1:
            raise BDLoRAError(f"--max-error: found {self.max_error}, expected a number of at least 0 and below 1")


@dataclass(frozen=True)
class Calibration:
    """Where the moments of the modules' inputs come from.

    Attributes:
        text: a text file to run the base model over; None to reuse ``moments``.
        model: the base model's folder or hub name, for transformers.
        moments: a file to save the moments to (replaced if it exists), or to reuse when ``text`` is None.
        max_tokens: tokens of the text that are used.
        sequence_length: tokens per forward pass.
    """

    text: str | None = None
    model: str | None = None
    moments: str | None = None
    max_tokens: int = 65536
    sequence_length: int = 512

    @property
    def sources(self) -> tuple[str | None, str | None, str | None]:
        return self.text, self.model, self.moments

    def check(self) -> None:
        """Raises `BDLoRAError` for what cannot be meant."""
        if (self.text is None) != (self.model is None):
            raise BDLoRAError("--calibrate and --model: found one of them, expected both")
        if self.text is None and self.moments is None:
            raise BDLoRAError("calibration: found neither --calibrate nor --moments, expected one of them")
        if self.max_tokens < 1 or self.sequence_length < 1:
            raise BDLoRAError(
                f"calibration: found {self.max_tokens} tokens, sequences of {self.sequence_length}, expected at least 1"
            )
        if self.moments is not None:
            _check_place("--moments", self.moments)


def _check_place(flag: str, path: str) -> None:
    """Before the long work whose result shall go there."""
    if not Path(path).absolute().parent.is_dir():
        raise BDLoRAError(f"{flag}: found no folder {Path(path).parent}, expected one for '{path}'")


@dataclass(frozen=True)
class ConvertOptions:
    """Everything of a conversion but its source and destination. Picklable.

    Attributes:
        nblocks: blocks of the result; 1 is plain LoRA.
        choice: how the rank is chosen.
        target_modules_bd_a: patterns of row-parallel modules; None asks the table of usual names, `sides.SIDES`.
        target_modules_bd_b: patterns of column-parallel modules. Given either, the table is not asked.
        keep_plain: leave modules without a side plain instead of refusing them.
        calibration: minimise the error on activations instead of the delta's.
        dtype: of the result; None keeps the source's (the widest, when its tensors differ).
        compute_dtype: float32 or float64; None is float64 for a float64 source and with calibration, else float32.
        device: where the decompositions run, as torch names it.
        threads: modules worked on at a time.
        force: replace an existing destination.
        plot: an image file (.png, .svg) to draw error against parameters to; needs matplotlib.
    """

    nblocks: int
    choice: RankChoice = RankChoice()
    target_modules_bd_a: tuple[str, ...] | None = None
    target_modules_bd_b: tuple[str, ...] | None = None
    keep_plain: bool = False
    calibration: Calibration | None = None
    dtype: str | None = None
    compute_dtype: str | None = None
    device: str = "cpu"
    threads: int = 1
    force: bool = False
    plot: str | None = None

    def check(self) -> None:
        """Raises `BDLoRAError` for what cannot be meant."""
        if self.nblocks < 1:
            raise BDLoRAError(f"--nblocks: found {self.nblocks}, expected at least 1")
        if self.threads < 1:
            raise BDLoRAError(f"--threads: found {self.threads}, expected at least 1")
        self.choice.check(self.nblocks)
        if self.calibration is not None:
            self.calibration.check()
            if self.choice.exact:
                raise BDLoRAError(
                    "calibration: found an exact conversion, expected --rank, --param-ratio or --max-error"
                )
        for flag, value, known in (
            ("--dtype", self.dtype, tuple(DTYPES)),
            ("--compute-dtype", self.compute_dtype, ("float32", "float64")),
        ):
            if value is not None and value not in known:
                raise BDLoRAError(f"{flag}: found '{value}', expected one of {', '.join(known)}")
        if self.plot is not None:
            _check_place("--plot", self.plot)
        try:
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            message = str(error).splitlines()[0]
            raise BDLoRAError(
                f"--device: found '{self.device}' ({message}), expected a device of this machine"
            ) from error

    def record(self) -> dict[str, Any]:
        """The options that decide the result's bytes, for metadata and to know a finished conversion again."""
        choice = self.choice
        record: dict[str, Any] = {
            "nblocks": self.nblocks,
            "rank": choice.rank,
            "param_ratio": choice.param_ratio,
            "max_error": choice.max_error,
            "target_modules_bd_a": self.target_modules_bd_a and list(self.target_modules_bd_a),
            "target_modules_bd_b": self.target_modules_bd_b and list(self.target_modules_bd_b),
            "keep_plain": self.keep_plain or None,
            "dtype": self.dtype,
            "compute_dtype": self.compute_dtype,
        }
        if self.calibration is not None:
            text, model, moments = (p and Path(p).name for p in self.calibration.sources)
            record |= {"text": text, "model": model, "moments": moments if text is None else None}
            record["max_tokens"] = self.calibration.max_tokens if text else None
        return {key: value for key, value in record.items() if value is not None}
