"""From the words of ``bdlora launch`` to SGLang's server arguments."""

from collections.abc import Mapping, Sequence

from sglang.srt.server_args import ServerArgs, prepare_server_args

from bdlora_sglang.adapter import Adapter
from bdlora_sglang.adapter.locate import NamedAdapter, adapter_folder
from bdlora_sglang.errors import BDLoRAError
from bdlora_sglang.serving.engine import platform_defaults
from bdlora_sglang.serving.hardware import has_accelerator
from bdlora_sglang.serving.options import LoRASharding


def server_args(
    model_path: str,
    tp: int,
    adapters: Sequence[NamedAdapter],
    sglang_flags: Sequence[str],
    lora_sharding: LoRASharding = LoRASharding.COMMUNICATION_FREE,
) -> ServerArgs:
    """SGLang's server arguments.

    Args:
        model_path: a path, repo id or URL, as `resolve_model` gives it.
        tp: tensor-parallel degree.
        adapters: those to load at start.
        sglang_flags: flags that SGLang reads itself, as they were typed.
        lora_sharding: with ``SGLANG``, ``--lora-backend`` is the user's choice.

    Raises:
        BDLoRAError: flags that contradict each other, or adapters that SGLang's own LoRA would misread.
    """
    if adapters and _value(sglang_flags, ("--lora-paths",)) is not None:
        raise BDLoRAError("--lora-paths: found both it and --adapters, expected one of them")
    if lora_sharding is LoRASharding.SGLANG:
        _check_sglang_serves(adapters)
    elif (backend := _value(sglang_flags, ("--lora-backend",))) is not None:
        raise BDLoRAError(
            f"--lora-backend: found '{backend}', expected none: BD-LoRA brings its own; "
            "--lora-sharding sglang takes one"
        )
    dp = _value(sglang_flags, ("--dp-size", "--data-parallel-size", "--dp")) or "1"
    defaults = platform_defaults(tp, int(dp) if dp.isdigit() else 1, lora_sharding)
    argv = ["--model-path", model_path, "--tp-size", str(tp), *sglang_flags]
    return prepare_server_args([*argv, *_missing_flags(defaults, sglang_flags), *_lora_flags(adapters)])


def _check_sglang_serves(adapters: Sequence[NamedAdapter]) -> None:
    if not has_accelerator():
        raise BDLoRAError(
            "--lora-sharding sglang: found no GPU, expected one: SGLang's own LoRA pins host memory for it"
        )
    for adapter in adapters:
        if Adapter.open(adapter_folder(adapter.path)).kind == "BD-LoRA":
            raise BDLoRAError(
                f"{adapter.path}: found a BD-LoRA adapter, expected a plain one with --lora-sharding sglang: "
                "SGLang's own LoRA does not read 'use_bdlora'"
            )


def _lora_flags(adapters: Sequence[NamedAdapter]) -> list[str]:
    if not adapters:
        return []
    return ["--enable-lora", "--lora-paths", *(f"{adapter.name}={adapter.path}" for adapter in adapters)]


def _missing_flags(defaults: Mapping[str, object], given: Sequence[str]) -> list[str]:
    """``defaults`` as flags, without those that the user has set."""
    flags: list[str] = []
    for name, value in defaults.items():
        flag = "--" + name.replace("_", "-")
        if _value(given, (flag,)) is None:
            flags += [flag] if value is True else [flag, str(value)]
    return flags


def _value(flags: Sequence[str], names: Sequence[str]) -> str | None:
    """The value of a flag that SGLang parses later and we must know now; None where it is not given."""
    for word, following in zip(flags, [*flags[1:], ""], strict=False):
        name, separator, value = word.partition("=")
        if name in names:
            return value if separator else following
    return None
