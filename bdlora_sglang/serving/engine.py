"""SGLang's ``Engine`` and server, with our scheduler process."""

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import sglang
from sglang.srt.entrypoints.engine import Engine as SGLangEngine
from sglang.srt.entrypoints.http_server import launch_server as sglang_launch_server
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils import configure_logger

from bdlora_sglang.errors import BDLoRAError
from bdlora_sglang.serving.adapter_checks import check_adapters
from bdlora_sglang.serving.checks import (
    asks_for_lora,
    check_address,
    check_server_args,
    foreign_lora_backend,
    resolve,
)
from bdlora_sglang.serving.cpu.cores import leave_ranks_alone
from bdlora_sglang.serving.gate.masking import mask_log, secrets_of
from bdlora_sglang.serving.gate.middleware import add_gate
from bdlora_sglang.serving.gate.names import check_names_at_start
from bdlora_sglang.serving.gate.tokenizer_manager import gated_tokenizer_manager
from bdlora_sglang.serving.hardware import (
    cpu_defaults,
    gpu_defaults,
    has_accelerator,
    on_cpu_platform,
    use_cpu_platform,
)
from bdlora_sglang.serving.options import LoRASharding, ServingOptions
from bdlora_sglang.serving.process import run_detokenizer_process, run_scheduler_process
from bdlora_sglang.serving.scheduler import BDLoRAScheduler
from bdlora_sglang.serving.start_failures import StartFailures

logger = logging.getLogger(__name__)

TESTED_SGLANG = ("0.5.23",)

# Kept to the end with what their frames hold: once collected, ZMQ would wait for ever for processes that are gone.
_failed_starts: list[Exception] = []


class Engine(SGLangEngine):
    """``sglang.Engine`` with BD-LoRA inside; takes the same arguments.

    Args:
        max_local_rank, skip_bad_adapters: see `ServingOptions`.
        lora_sharding: "communication-free" or "fully-sharded"; `sglang.Engine` is SGLang's own LoRA.
        allow_untested_sglang: go on with an SGLang version that this package was not tested with.

    Raises:
        BDLoRAError: an SGLang version that was not tested, a feature that is not served (`features`), a TP degree that
            the model cannot be split over, options that contradict each other, or a rank that failed at its start.
    """

    scheduler_class = BDLoRAScheduler

    def __init__(
        self,
        *,
        max_local_rank: int | None = None,
        lora_sharding: str = LoRASharding.COMMUNICATION_FREE.value,
        skip_bad_adapters: bool = False,
        allow_untested_sglang: bool = False,
        **kwargs: Any,
    ) -> None:
        options = ServingOptions(max_local_rank, _sharding_of_ours(lora_sharding), skip_bad_adapters=skip_bad_adapters)
        check_sglang_version(allow_untested_sglang)
        load_plugins()
        if "server_args" in kwargs:
            server_args = kwargs["server_args"]
        else:
            kwargs = {"log_level": "error", **defaults_beside(kwargs, options.lora_sharding), **kwargs}
            server_args = self.server_args_class(**kwargs)
        configure_logger(server_args)
        _check(server_args, options)
        failures = StartFailures()
        self.init_tokenizer_manager_func = gated_tokenizer_manager(options.gate)
        # Attributes that SGLang provides for private forks of its processes.
        self.run_scheduler_process_func = partial(
            run_scheduler_process, options=options, failures=failures, scheduler_class=self.scheduler_class
        )
        self.run_detokenizer_process_func = run_detokenizer_process
        try:
            super().__init__(server_args=server_args)
        except Exception as error:
            self.shutdown()
            _failed_starts.append(error)
            raise failures.reason(error) from error


def launch_server(server_args: ServerArgs, options: ServingOptions) -> None:
    """Run SGLang's HTTP server with BD-LoRA inside until it is stopped; raises `BDLoRAError` like `Engine`.

    With ``LoRASharding.SGLANG`` nothing is ours: the same server, for comparison.
    """
    if options.lora_sharding is LoRASharding.SGLANG:
        sglang_launch_server(server_args)
        return
    _check(server_args, options)
    check_address(server_args.host, server_args.port)
    if on_cpu_platform():
        leave_ranks_alone()
    mask_log(secrets_of(server_args))
    add_gate()
    failures = StartFailures()
    try:
        sglang_launch_server(
            server_args,
            init_tokenizer_manager_func=gated_tokenizer_manager(options.gate),
            run_scheduler_process_func=partial(run_scheduler_process, options=options, failures=failures),
        )
    except Exception as error:
        raise failures.reason(error) from error


def _check(server_args: ServerArgs, options: ServingOptions) -> None:
    """Everything that can be known before a process is spawned; raises `BDLoRAError`."""
    resolve(server_args)
    check_server_args(server_args)
    check_names_at_start(server_args, options.gate.aliases)
    if asks_for_lora(server_args):
        for fault in check_adapters(server_args, options.skip_bad_adapters):
            logger.warning(f"Starting without adapter '{fault.adapter.name}': {fault.reason}")


def _sharding_of_ours(name: str) -> LoRASharding:
    ours = (LoRASharding.COMMUNICATION_FREE, LoRASharding.FULLY_SHARDED)
    for sharding in ours:
        if sharding.value == name:
            return sharding
    raise BDLoRAError(f"lora_sharding: found '{name}', expected {' or '.join(sharding.value for sharding in ours)}")


def check_sglang_version(allow_untested: bool) -> None:
    """Raise `BDLoRAError` for an SGLang that was not tested, unless the user says to go on."""
    if sglang.__version__ not in TESTED_SGLANG and not allow_untested:
        raise BDLoRAError(
            f"SGLang: found version {sglang.__version__}, expected {' or '.join(TESTED_SGLANG)}, which BD-LoRA was "
            "tested with; go on at your own risk with --allow-untested-sglang (Engine: allow_untested_sglang=True)"
        )


def defaults_beside(given: Mapping[str, Any], lora_sharding: LoRASharding) -> dict[str, object]:
    """Server arguments for what ``given`` leaves open, by their names in ``ServerArgs``.

    Raises:
        BDLoRAError: a LoRA backend is given that would not be used.
    """
    backend = given.get("lora_backend")
    if backend is not None and lora_sharding is not LoRASharding.SGLANG:
        raise foreign_lora_backend(backend)
    defaults = platform_defaults(given.get("tp_size", 1), given.get("dp_size", 1), lora_sharding)
    return {name: value for name, value in defaults.items() if name not in given}


def platform_defaults(
    tp_size: int, dp_size: int, lora_sharding: LoRASharding = LoRASharding.COMMUNICATION_FREE
) -> dict[str, object]:
    """Server arguments that this machine asks for where the user gives none; chooses the CPU platform without a GPU."""
    if has_accelerator():
        return gpu_defaults(lora_sharding)
    use_cpu_platform(tp_size * dp_size)
    return cpu_defaults()
