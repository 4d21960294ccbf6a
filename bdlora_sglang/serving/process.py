"""The scheduler process of one rank: SGLang's ``managers.scheduler.run_scheduler_process``, with our scheduler."""

import logging
import os
import signal
from multiprocessing.connection import Connection
from typing import Any

import psutil
from sglang.srt.distributed.parallel_state import abort_distributed_environment
from sglang.srt.environ import envs
from sglang.srt.managers.detokenizer_manager import run_detokenizer_process as sglang_run_detokenizer_process
from sglang.srt.managers.scheduler import configure_scheduler_process, resolve_spawn_dp_rank
from sglang.srt.observability.trace import process_tracing_init, trace_set_thread_info
from sglang.srt.plugins import load_plugins
from sglang.srt.runtime_context import SpawnRanks, get_disagg, get_observability, publish, spawn_world_rank
from sglang.srt.server_args import PortArgs, ServerArgs
from sglang.utils import get_exception_traceback

from bdlora_sglang.serving.cpu.cores import bind_rank, leave_ranks_alone
from bdlora_sglang.serving.hardware import on_cpu_platform
from bdlora_sglang.serving.options import ServingOptions
from bdlora_sglang.serving.report import print_adapters
from bdlora_sglang.serving.scheduler import BDLoRAScheduler
from bdlora_sglang.serving.start_failures import StartFailures

logger = logging.getLogger(__name__)

_TRACE_LABELS = {"prefill": "Prefill Scheduler", "decode": "Decode Scheduler"}


def run_scheduler_process(
    server_args: ServerArgs,
    port_args: PortArgs,
    gpu_id: int,
    tp_rank: int,
    pp_rank: int,
    dp_rank: int | None,
    pipe_writer: Connection,
    display_tp_rank: int | None = None,
    display_dp_rank: int | None = None,
    display_moe_ep_rank: int | None = None,
    *,
    options: ServingOptions,
    failures: StartFailures,
    scheduler_class: type[BDLoRAScheduler] = BDLoRAScheduler,
) -> None:
    """Run a scheduler until it is told to stop. The positional arguments are SGLang's."""
    own_cores = bind_rank(gpu_id - server_args.base_gpu_id) if on_cpu_platform() else None
    load_plugins()
    dp_rank = resolve_spawn_dp_rank(dp_rank)
    world_rank = spawn_world_rank(server_args, tp_rank=tp_rank, pp_rank=pp_rank)
    publish(server_args, role="scheduler", ranks=SpawnRanks(world_rank=world_rank, dp_rank=dp_rank, gpu_id=gpu_id))
    configure_scheduler_process(
        server_args,
        gpu_id,
        display_tp_rank=display_tp_rank,
        display_dp_rank=display_dp_rank,
        display_moe_ep_rank=display_moe_ep_rank,
    )
    if own_cores is not None:
        logger.info(f"This rank runs on {own_cores}.")
    parent_process = psutil.Process().parent()
    _init_tracing(tp_rank, dp_rank, pp_rank)

    scheduler: BDLoRAScheduler | None = None
    started = False
    try:
        scheduler = scheduler_class(server_args, port_args, options=options)
        if tp_rank == 0 and not dp_rank and scheduler.enable_lora:
            print_adapters(scheduler.tp_worker.model_runner)
        pipe_writer.send(scheduler.get_init_info())
        started = True
        scheduler.run_event_loop()
    except Exception as error:
        logger.error(f"Scheduler hit an exception: {get_exception_traceback()}")
        if not started:
            failures.put(error)
            # What SGLang reads as a failed start.
            pipe_writer.send({"status": "failed"})
            return
        parent_process.send_signal(signal.SIGQUIT)
        if envs.SGLANG_KILLPG_ON_SCHEDULER_EXCEPTION.get():
            os.killpg(os.getpgrp(), signal.SIGKILL)
    finally:
        if scheduler is not None:
            _shut_down(scheduler)


def run_detokenizer_process(*arguments: Any, **options: Any) -> None:
    """SGLang's detokenizer, out of the ranks' way."""
    if on_cpu_platform():
        leave_ranks_alone()
    sglang_run_detokenizer_process(*arguments, **options)


def _init_tracing(tp_rank: int, dp_rank: int | None, pp_rank: int) -> None:
    if not get_observability().enable_trace:
        return
    process_tracing_init(
        get_observability().otlp_traces_endpoint,
        get_observability().otlp_service_name,
        trace_modules=get_observability().trace_modules,
    )
    label = _TRACE_LABELS.get(get_disagg().disaggregation_mode, "Scheduler")
    trace_set_thread_info(label, tp_rank, dp_rank, pp_rank)


def _shut_down(scheduler: BDLoRAScheduler) -> None:
    scheduler.metrics_reporter._shutdown_fpm()
    if scheduler.async_d2h_worker is not None:
        scheduler.async_d2h_worker.shutdown()
        scheduler.async_d2h_worker = None
    # After an exception the device may hang, and these would hang with it.
    if scheduler.gracefully_exit:
        scheduler.release_host_resources()
        abort_distributed_environment()
