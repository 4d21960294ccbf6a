"""``bdlora launch``: SGLang's own server, with BD-LoRA inside."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from bdlora_cli.config_file import read_config, sglang_flags
from bdlora_cli.dry_run import print_memory_plan
from bdlora_sglang.errors import BDLoRAError
from bdlora_sglang.model_names import MODEL_NAMES, resolve_model
from bdlora_sglang.serving.options import GateOptions, LoRASharding, ServingOptions

_HELP = """Start SGLang's server with BD-LoRA inside.

Every other flag is SGLang's and passes through unchanged: --port, --host, --mem-fraction-static, --quantization,
--max-loras-per-batch, --max-lora-rank, --lora-target-modules, --nnodes, --node-rank, --dist-init-addr, --api-key,
--enable-metrics, ... ("python -m sglang.launch_server --help" lists them).

Short names of models:

""" + "\n\n".join(f"  {name}: {repo}" for name, repo in MODEL_NAMES.items())


def launch(
    context: typer.Context,
    model: Annotated[str, typer.Option("--model", "--model-path", help="Path, Hugging Face repo id or short name.")],
    tp: Annotated[
        int | None, typer.Option("--tp", "--tp-size", "--tensor-parallel-size", min=1, help="TP degree. Default: 1.")
    ] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapters",
            help="A folder with one PEFT adapter a subfolder, an adapter folder, name=path or a repo id; repeatable.",
        ),
    ] = None,
    max_local_rank: Annotated[
        int | None,
        typer.Option(
            "--max-local-rank",
            min=1,
            help="Largest rank that a memory slot holds on one GPU (an N-block adapter on N ranks: rank / N). "
            "Default: worked out from --adapters, or --max-lora-rank where that is given.",
        ),
    ] = None,
    lora_sharding: Annotated[
        LoRASharding,
        typer.Option(
            "--lora-sharding",
            help="How adapters are spread over the GPUs. fully-sharded: as in S-LoRA, with a collective more in each "
            "layer with LoRA; sglang: SGLang's own LoRA with a --lora-backend of your choice. Both are for comparison.",
        ),
    ] = LoRASharding.COMMUNICATION_FREE,
    adapter_root: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter-root",
            help="While the server runs, adapters are loaded from below this folder alone; repeatable. Default: the "
            "folders in which those of --adapters lie.",
        ),
    ] = None,
    adapters_from_hub: Annotated[
        bool, typer.Option("--adapters-from-hub", help="Clients may load adapters from Hugging Face by repo id.")
    ] = False,
    reload_on_request: Annotated[
        bool,
        typer.Option("--reload-on-request", help="A request for an unloaded adapter loads it again, as in SGLang."),
    ] = False,
    allow_unknown_models: Annotated[
        bool,
        typer.Option("--allow-unknown-models", help="The base model answers for unknown model names, as in SGLang."),
    ] = False,
    skip_bad_adapters: Annotated[
        bool, typer.Option("--skip-bad-adapters", help="Start without the adapters given that cannot be served.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Say what slots, weights and KV cache take on each GPU, from the model's config, and end."
        ),
    ] = False,
    gpu_memory: Annotated[
        float | None, typer.Option("--gpu-memory", min=1, help="GiB of a GPU, for --dry-run. Default: this machine's.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", callback=read_config, is_eager=True, help="A YAML file of flags, those above and SGLang's."
        ),
    ] = None,
    allow_untested_sglang: Annotated[
        bool, typer.Option("--allow-untested-sglang", help="Go on with an SGLang that BD-LoRA was not tested with.")
    ] = False,
) -> None:
    # First what needs no SGLang, which takes many seconds to import.
    from bdlora_sglang.adapter.locate import find_adapters, folders_of

    model_path = resolve_model(model)
    named = find_adapters(adapters or [])
    gate = GateOptions(
        adapter_roots=tuple(adapter_root) if adapter_root else folders_of(named),
        adapters_from_hub=adapters_from_hub,
        reload_on_request=reload_on_request,
        allow_unknown_models=allow_unknown_models,
        aliases=(model,),
    )
    options = ServingOptions(max_local_rank, lora_sharding, gate, skip_bad_adapters)

    if dry_run:
        with sglang_flags(context) as flags:
            print_memory_plan(model_path, tp, named, flags, options, gpu_memory)
        return

    from sglang.srt.utils import kill_process_tree

    from bdlora_sglang.serving import engine, launch
    from bdlora_sglang.serving.hardware import has_accelerator

    engine.check_sglang_version(allow_untested_sglang)
    if not has_accelerator():
        typer.echo("No GPU here: serving on the CPU platform, without CUDA graphs.")
    with sglang_flags(context) as flags:
        arguments = launch.server_args(model_path, tp, named, flags, lora_sharding)
    try:
        engine.launch_server(arguments, options)
    except BDLoRAError as error:
        kill_process_tree(os.getpid(), include_parent=False)
        typer.secho(f"bdlora: {error}", fg=typer.colors.RED, err=True)
        # Python's own way out would still complain, below the reason, of semaphores that the killed processes had.
        sys.stderr.flush()
        os._exit(1)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


launch.__doc__ = _HELP
