"""SGLang's ``Engine`` and server, with our scheduler process."""

from functools import partial
from typing import Any

import sglang
from sglang.srt.entrypoints.engine import Engine as SGLangEngine
from sglang.srt.entrypoints.http_server import launch_server as sglang_launch_server
from sglang.srt.server_args import ServerArgs

from bdlora_sglang.errors import BDLoRAError
from bdlora_sglang.serving.checks import check_server_args
from bdlora_sglang.serving.cpu.cores import leave_ranks_alone
from bdlora_sglang.serving.gate.masking import mask_log, secrets_of
from bdlora_sglang.serving.gate.middleware import add_gate
from bdlora_sglang.serving.gate.names import check_names_at_start
from bdlora_sglang.serving.gate.tokenizer_manager import check_frontend, gated_tokenizer_manager
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

TESTED_SGLANG = ("0.5.23",)


class Engine(SGLangEngine):
    """``sglang.Engine`` with BD-LoRA inside; takes the same arguments.

    Args:
        max_local_rank: see `ServingOptions`.
        lora_sharding: "communication-free" or "fully-sharded"; `sglang.Engine` is SGLang's own LoRA.
        allow_untested_sglang: go on with an SGLang version that this package was not tested with.

    Raises:
        BDLoRAError: an SGLang version that was not tested, pipeline parallelism, a TP degree that the
            model cannot be split over, or options that contradict each other.
    """

    scheduler_class = BDLoRAScheduler

    def __init__(
        self,
        *,
        max_local_rank: int | None = None,
        lora_sharding: str = LoRASharding.COMMUNICATION_FREE.value,
        allow_untested_sglang: bool = False,
        **kwargs: Any,
    ) -> None:
        options = ServingOptions(max_local_rank, _sharding_of_ours(lora_sharding))
        check_sglang_version(allow_untested_sglang)
        if "server_args" in kwargs:
            check_parallelism(kwargs["server_args"].pp_size)
        else:
            check_parallelism(kwargs.get("pp_size", 1))
            sizes = kwargs.get("tp_size", 1), kwargs.get("dp_size", 1)
            kwargs = {**platform_defaults(*sizes, options.lora_sharding), **kwargs}
        server_args = kwargs.get("server_args") or self.server_args_class(**kwargs)
        check_server_args(server_args)
        check_frontend(server_args)
        check_names_at_start(server_args)
        self.init_tokenizer_manager_func = gated_tokenizer_manager(options.gate)
        # An attribute that SGLang provides for private forks of its processes.
        self.run_scheduler_process_func = partial(
            run_scheduler_process, options=options, scheduler_class=self.scheduler_class
        )
        self.run_detokenizer_process_func = run_detokenizer_process
        super().__init__(**kwargs)


def launch_server(server_args: ServerArgs, options: ServingOptions) -> None:
    """Run SGLang's HTTP server with BD-LoRA inside until it is stopped; raises `BDLoRAError` like `Engine`.

    With ``LoRASharding.SGLANG`` nothing is ours: the same server, for comparison.
    """
    if options.lora_sharding is LoRASharding.SGLANG:
        sglang_launch_server(server_args)
        return
    check_parallelism(server_args.pp_size)
    check_server_args(server_args)
    check_frontend(server_args)
    check_names_at_start(server_args, options.gate.aliases)
    if on_cpu_platform():
        leave_ranks_alone()
    mask_log(secrets_of(server_args))
    add_gate()
    sglang_launch_server(
        server_args,
        init_tokenizer_manager_func=gated_tokenizer_manager(options.gate),
        run_scheduler_process_func=partial(run_scheduler_process, options=options),
    )


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


def check_parallelism(pp_size: int) -> None:
    """Raise `BDLoRAError` for a layout that BD-LoRA does not serve."""
    if pp_size != 1:
        raise BDLoRAError(f"--pp-size: found {pp_size}, expected 1: pipeline parallelism is not supported")


def platform_defaults(
    tp_size: int, dp_size: int, lora_sharding: LoRASharding = LoRASharding.COMMUNICATION_FREE
) -> dict[str, object]:
    """Server arguments that this machine asks for where the user gives none; chooses the CPU platform without a GPU."""
    if has_accelerator():
        return gpu_defaults(lora_sharding)
    use_cpu_platform(tp_size * dp_size)
    return cpu_defaults()
