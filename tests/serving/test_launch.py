"""What ``bdlora launch`` makes of its words, and what it refuses before any server starts."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bdlora_sglang.adapter.locate import find_adapters
from bdlora_sglang.errors import BDLoRAError
from bdlora_sglang.model_names import MODEL_NAMES, resolve_model
from tests.serving.zoo import Zoo

pytestmark = pytest.mark.usefixtures("same_environment")


@pytest.fixture
def model(zoo: Zoo) -> Path:
    return zoo.model("llama")


@pytest.fixture
def adapter(zoo: Zoo, model: Path) -> Path:
    return zoo.adapter(model, "bd2-r8", rank=8, nblocks=2, seed=4)


def server_args(model: Path, tp: int, adapters: list[str], flags: list[str]) -> Any:
    from bdlora_sglang.serving.launch import server_args

    return server_args(resolve_model(str(model)), tp, find_adapters(adapters), flags)


def test_sglangs_flags_pass_through(model: Path, adapter: Path) -> None:
    flags = ["--port", "31000", "--mem-fraction-static", "0.33", "--max-loras-per-batch", "5", "--api-key", "secret"]
    flags += ["--enable-metrics", "--nnodes", "2", "--node-rank", "1", "--dist-init-addr", "host:1234"]
    args = server_args(model, 2, [str(adapter)], flags)
    assert (args.port, args.mem_fraction_static, args.max_loras_per_batch) == (31000, 0.33, 5)
    assert (args.api_key, args.enable_metrics) == ("secret", True)
    assert (args.nnodes, args.node_rank, args.dist_init_addr) == (2, 1, "host:1234")
    assert (args.tp_size, args.model_path) == (2, str(model))
    assert args.lora_paths == [f"bd2-r8={adapter}"]


def test_the_machines_defaults_give_way_to_the_user(model: Path) -> None:
    args = server_args(model, 1, [], ["--max-total-tokens", "99", "--attention-backend=torch_native"])
    assert args.max_total_tokens == 99
    assert server_args(model, 1, [], []).max_total_tokens != 99


@pytest.mark.parametrize(
    ("own", "flags", "resolved"),
    [
        ("float32", [], "float32"),
        (None, [], "float32"),
        ("float32", ["--dtype", "float16"], "float16"),
        ("bfloat16", [], "bfloat16"),
        ("float16", [], "float16"),
        ("float16", ["--dtype", "bfloat16"], "bfloat16"),
    ],
)
def test_a_cpu_keeps_a_models_own_type(
    model: Path, tmp_path: Path, own: str | None, flags: list[str], resolved: str, caplog: pytest.LogCaptureFixture
) -> None:
    """SGLang's default would make float16 of float32, which nothing here is fast with."""
    from sglang.srt.arg_groups.overrides import model_config_of

    from bdlora_sglang.serving.checks import check_server_args, logger, resolve

    config = json.loads((model / "config.json").read_text()) | {"dtype": own}
    (tmp_path / "config.json").write_text(json.dumps(config))
    args = server_args(tmp_path, 1, [], flags)
    resolve(args)
    logger.addHandler(caplog.handler)  # SGLang replaces those of the root
    try:
        check_server_args(args)
    finally:
        logger.removeHandler(caplog.handler)
    assert str(model_config_of(args).dtype) == f"torch.{resolved}"
    assert ("--dtype: found float16" in caplog.text) == (resolved == "float16")


def test_a_folder_of_adapters(zoo: Zoo, model: Path, adapter: Path) -> None:
    other = zoo.adapter(model, "plain-r16", rank=16, seed=1)
    found = find_adapters([str(adapter.parent)])
    assert {"bd2-r8", "plain-r16"} <= {item.name for item in found}
    assert [item.name for item in found] == sorted(item.name for item in found)
    assert [(item.name, item.path) for item in find_adapters([f"mine={other}", str(adapter)])] == [
        ("mine", str(other)),
        ("bd2-r8", str(adapter)),
    ]
    assert find_adapters(["org/some-adapter"])[0].name == "some-adapter"


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        (["{a}", "{a}"], ["bd2-r8", "names that differ"]),
        (["x={a}", "x={a}"], ["'x'"]),
        (["a\tb={a}"], ["'a\\tb'", "printable"]),
        (["={a}"], ["''"]),
        (["./nowhere/at/all"], ["./nowhere/at/all", "no such folder"]),
        (["{empty}"], ["adapter_config.json", "subfolders"]),
    ],
    ids=["same folder twice", "same name", "tab", "no name", "nowhere", "empty folder"],
)
def test_bad_adapter_specs(adapter: Path, tmp_path: Path, specs: list[str], words: list[str]) -> None:
    with pytest.raises(BDLoRAError) as raised:
        find_adapters([spec.format(a=adapter, empty=tmp_path) for spec in specs])
    for word in ["adapter name" if words[0] in {"'a\\tb'", "''"} else "--adapters", *words]:
        assert word in str(raised.value)


def test_adapters_and_lora_paths_together_are_refused(model: Path, adapter: Path) -> None:
    with pytest.raises(BDLoRAError, match="--lora-paths"):
        server_args(model, 1, [str(adapter)], ["--lora-paths", f"x={adapter}"])


def test_a_lora_backend_of_sglangs_is_refused(model: Path) -> None:
    with pytest.raises(BDLoRAError, match="--lora-backend: found 'csgmv'"):
        server_args(model, 1, [], ["--lora-backend=csgmv"])


def test_sglangs_own_lora_needs_a_gpu_and_plain_adapters(
    model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bdlora_sglang.serving import launch
    from bdlora_sglang.serving.options import LoRASharding

    def arguments() -> Any:
        return launch.server_args(
            str(model), 1, find_adapters([str(adapter)]), ["--lora-backend", "triton"], LoRASharding.SGLANG
        )

    with pytest.raises(BDLoRAError, match="--lora-sharding sglang: found no GPU"):
        arguments()
    monkeypatch.setattr(launch, "has_accelerator", lambda: True)
    with pytest.raises(BDLoRAError, match=f"{adapter}: found a BD-LoRA adapter, expected a plain one"):
        arguments()


def test_options_that_contradict_each_other_are_refused(model: Path) -> None:
    from bdlora_sglang import Engine

    with pytest.raises(BDLoRAError, match="--max-local-rank: found 4 with --lora-sharding fully-sharded"):
        Engine(model_path=str(model), max_local_rank=4, lora_sharding="fully-sharded")
    with pytest.raises(BDLoRAError, match="lora_sharding: found 'sharded', expected communication-free or fully-shard"):
        Engine(model_path=str(model), lora_sharding="sharded")


def test_pipeline_parallelism_is_refused(model: Path) -> None:
    from bdlora_sglang import Engine

    with pytest.raises(BDLoRAError, match="--pp-size: found 2, expected 1"):
        Engine(model_path=str(model), pp_size=2)


def test_an_adapter_called_as_the_base_model_is_refused(model: Path, adapter: Path) -> None:
    from bdlora_sglang import Engine
    from bdlora_sglang.serving.gate.names import check_names_at_start

    for name in ("mine", "base", "default", str(model), "mine:x", "short"):
        arguments = server_args(model, 1, [f"{name}={adapter}"], ["--served-model-name", "mine"])
        with pytest.raises(BDLoRAError, match="adapter name"):
            check_names_at_start(arguments, aliases=["short"])
    with pytest.raises(BDLoRAError, match="adapter name"):
        Engine(model_path=str(model), lora_paths=[f"default={adapter}"])


def test_servers_without_the_gate_are_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bdlora_sglang import Engine

    with pytest.raises(BDLoRAError, match="--tokenizer-worker-num: found 2, expected 1"):
        Engine(model_path=str(model), tokenizer_worker_num=2)
    monkeypatch.setenv("SGLANG_RUST_SERVER", "1")
    with pytest.raises(BDLoRAError, match="SGLANG_RUST_SERVER"):
        Engine(model_path=str(model))


def test_each_engine_gets_a_binding_of_its_own_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine in a process that an engine's process started, too."""
    from bdlora_sglang.serving.hardware import use_cpu_platform

    monkeypatch.delenv("SGLANG_CPU_OMP_THREADS_BIND", raising=False)
    for ranks in (1, 4, 2):
        use_cpu_platform(ranks)
        assert len(os.environ["SGLANG_CPU_OMP_THREADS_BIND"].split("|")) == ranks
    command = [
        sys.executable,
        "-c",
        "from bdlora_sglang.serving.cpu.cores import *; choose_binding(3); print(os.environ[BINDING])",
    ]
    binding = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert len(binding.split("|")) == 3
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|0|0")
    use_cpu_platform(3)
    assert os.environ["SGLANG_CPU_OMP_THREADS_BIND"] == "0|0|0"


@pytest.mark.parametrize("name", ["no-such-model", "/no/such/model", "no-org/no-model"])
def test_a_base_model_that_is_not_there(name: str) -> None:
    with pytest.raises(BDLoRAError, match="--model") as raised:
        resolve_model(name)
    assert name in str(raised.value)


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(BDLoRAError, match=r"config\.json"):
        resolve_model(str(tmp_path))


def test_an_untested_sglang_stops_with_a_flag_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from bdlora_sglang.serving import engine

    engine.check_sglang_version(allow_untested=False)
    monkeypatch.setattr(engine, "TESTED_SGLANG", ("0.1.0",))
    with pytest.raises(BDLoRAError, match="--allow-untested-sglang"):
        engine.check_sglang_version(allow_untested=False)
    engine.check_sglang_version(allow_untested=True)


def test_the_command_line_ends_with_the_message_and_1(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bdlora_cli.main", "launch", "--model", "no-such-model", "--tp", "2"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("bdlora: --model no-such-model: found no such folder")


def test_an_address_where_nobody_can_listen_ends_the_start(model: Path) -> None:
    from bdlora_sglang.serving.checks import check_address

    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        command = [sys.executable, "-m", "bdlora_cli.main", "launch", "--model", str(model), "--port", str(port)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert result.returncode == 1
        message = f"bdlora: --host 127.0.0.1 --port {port}: found 'Address already in use', expected an address to"
        assert result.stderr.strip().splitlines()[-1].startswith(message)
    check_address("127.0.0.1", port)
    for host, number in (("192.0.2.1", port), ("127.0.0.1", 70000), ("no.such.host.invalid", port)):
        with pytest.raises(BDLoRAError, match=f"--host {host} --port {number}: found '.+', expected an address"):
            check_address(host, number)


def test_help_lists_the_short_names() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "bdlora_cli.main", "launch", "--help"], capture_output=True, text=True, timeout=100
    )
    assert result.returncode == 0
    assert all(name in result.stdout for name in MODEL_NAMES)


def test_sglangs_own_command_starts_it(model: Path, adapter: Path) -> None:
    command = [str(Path(sys.executable).with_name("sglang")), "serve", str(model), "--model-type", "bdlora"]
    command += ["--adapters", str(adapter), "--tp", "2", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "slots" in done.stdout
