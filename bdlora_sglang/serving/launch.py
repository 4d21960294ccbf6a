"""From the words of ``bdlora launch`` to SGLang's server arguments."""

import argparse
import json
from collections.abc import Container, Mapping, Sequence
from typing import Any

from sglang.srt.server_args import ServerArgs, prepare_server_args
from sglang.srt.utils.server_args_config_parser import ConfigArgumentMerger

from bdlora_sglang.adapter import Adapter
from bdlora_sglang.adapter.locate import NamedAdapter, adapter_folder
from bdlora_sglang.errors import BDLoRAError
from bdlora_sglang.serving.engine import defaults_beside
from bdlora_sglang.serving.hardware import has_accelerator
from bdlora_sglang.serving.options import LoRASharding


def server_args(
    model_path: str,
    tp: int | None,
    adapters: Sequence[NamedAdapter],
    sglang_flags: Sequence[str],
    lora_sharding: LoRASharding = LoRASharding.COMMUNICATION_FREE,
) -> ServerArgs:
    """SGLang's server arguments.

    Args:
        model_path: a path, repo id or URL, as `resolve_model` gives it.
        tp: tensor-parallel degree, unless it is among ``sglang_flags``.
        adapters: those to load at start.
        sglang_flags: flags that SGLang reads itself, as they were typed; ``--config FILE`` with more of them.
        lora_sharding: with ``SGLANG``, ``--lora-backend`` is the user's choice.

    Raises:
        BDLoRAError: flags that contradict each other, or adapters that SGLang's own LoRA would misread.
    """
    given_tp = [] if tp is None else ["--tp-size", str(tp)]
    argv = _with_config_file(["--model-path", model_path, *given_tp, *sglang_flags])
    given = given_arguments(argv)
    if adapters and "lora_paths" in given:
        raise BDLoRAError(
            "--lora-paths: found both it and --adapters, expected one of them: --adapters name=path for each adapter"
        )
    if lora_sharding is LoRASharding.SGLANG:
        _check_sglang_serves(adapters)
    defaults = defaults_beside(given, lora_sharding)
    return prepare_server_args([*argv, *_missing_flags(defaults, given), *_lora_flags(adapters)])


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
    return ["--enable-lora", "--lora-paths", *map(_lora_path, adapters)]


def _lora_path(adapter: NamedAdapter) -> str:
    """As SGLang reads it, which ends a name at the first "="."""
    if "=" in adapter.name:
        return json.dumps({"lora_name": adapter.name, "lora_path": adapter.path})
    return f"{adapter.name}={adapter.path}"


def _missing_flags(defaults: Mapping[str, object], given: Container[str]) -> list[str]:
    """``defaults`` as flags, without those that the user has set."""
    flags: list[str] = []
    for name, value in defaults.items():
        if name not in given:
            flag = "--" + name.replace("_", "-")
            flags += [flag] if value is True else [flag, str(value)]
    return flags


class _Given(argparse.Namespace):
    """What the user gave. SGLang takes the last of two ``--lora-paths`` without a word."""

    def __setattr__(self, name: str, value: object) -> None:
        if name == "lora_paths" and vars(self).get(name) is not None:
            raise BDLoRAError(
                "--lora-paths: found it twice, expected it once with all paths (or --adapters, which may be repeated)"
            )
        super().__setattr__(name, value)


def given_arguments(flags: Sequence[str]) -> dict[str, Any]:
    """SGLang's arguments by their names in ``ServerArgs``, as its own parser reads ``flags``; none that was not given.

    Raises:
        BDLoRAError: ``--lora-paths`` given twice.
    """
    parser = _sglang_parser()
    parser.set_defaults(**dict.fromkeys(ServerArgs.__struct_fields__))
    return {name: value for name, value in vars(parser.parse_args(flags, _Given())).items() if value is not None}


def _with_config_file(flags: list[str]) -> list[str]:
    """``flags`` with those that stand in the file of ``--config``."""
    try:
        return ConfigArgumentMerger(_sglang_parser()).merge_config_with_args(flags)
    except (OSError, ValueError) as error:
        raise BDLoRAError(f"--config: {error}") from error


def _sglang_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bdlora launch")
    ServerArgs.add_cli_args(parser)
    return parser
