"""The table of SGLang's features: what it refuses is refused however it is asked for, and the README shows it."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bdlora_sglang.errors import BDLoRAError
from bdlora_sglang.serving.feature import Feature, Status, check_features, flag, markdown_table
from bdlora_sglang.serving.features import FEATURES
from tests.serving.zoo import Zoo

ROOT = Path(__file__).parents[2]
VALUES: dict[str, Any] = {
    "disaggregation_mode": "prefill",
    "attn_dp_size": 2,
    "attn_cp_size": 2,
    "dcp_size": 2,
    "pp_size": 2,
    "ep_size": 2,
    "moe_dp_size": 2,
    "dwdp_size": 2,
    "moe_a2a_backend": "deepep",
    "max_lora_chunk_size": 64,
    "dllm_algorithm": "LowConfidence",
    "cpu_offload_gb": 1,
    "offload_group_size": 2,
    "radix_cache_backend": "lmcache",
    "hicache_storage_backend": "file",
    "tokenizer_worker_num": 2,
    "grpc_port": 31000,
}


pytestmark = pytest.mark.usefixtures("same_environment")


def _asked(*statuses: Status) -> list[Any]:
    """A feature with an argument that asks for it, for each argument."""
    cases: list[tuple[Feature, str, Any]] = []
    for feature in FEATURES:
        if feature.status in statuses:
            cases += [(feature, name, VALUES.get(name, True)) for name in feature.off]
            cases += [(feature, name, value) for name, values in feature.on.items() for value in values]
    return [pytest.param(*case, id=f"{case[1]}={case[2]}") for case in cases if not case[1].startswith("is_")]


def _resolved(**values: Any) -> Any:
    """A view in which nothing is asked for but ``values``."""
    names = {name for feature in FEATURES for name in [*feature.off, *feature.on] if name.islower()}
    return SimpleNamespace(**{**dict.fromkeys(names), **values})


def _refusal(model: Path, **arguments: Any) -> str:
    """What is said when an engine is asked for; no process may have been started."""
    from bdlora_sglang import Engine

    with pytest.raises(BDLoRAError) as raised:
        Engine(model_path=str(model), enable_lora=True, max_lora_rank=8, lora_target_modules=["all"], **arguments)
    return str(raised.value)


@pytest.mark.parametrize(("feature", "name", "value"), _asked(Status.REFUSED))
def test_what_is_not_served_is_refused_by_name(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch, feature: Feature, name: str, value: Any
) -> None:
    if name.isupper():
        monkeypatch.setenv(name, "1")
    given = {} if name.isupper() else {name: value}
    with pytest.raises(BDLoRAError) as raised:
        check_features(FEATURES, _resolved(**given), with_lora=True, on_cpu=False)
    assert str(raised.value).startswith(f"{flag(name)}: found {value}, expected ")
    assert feature.why in str(raised.value)
    # With real arguments SGLang may be the first to refuse, or to change what was asked for into what it implies.
    message = _refusal(zoo.model("llama"), **given)
    assert flag(name) in message or "SGLang refuses" in message or any(f.why and f.why in message for f in FEATURES)


@pytest.mark.parametrize(("feature", "name", "value"), _asked(Status.NEEDS_GPU))
def test_what_needs_a_gpu_is_refused_on_the_cpu(feature: Feature, name: str, value: Any) -> None:
    check_features(FEATURES, _resolved(**{name: value}), with_lora=True, on_cpu=False)
    with pytest.raises(BDLoRAError, match=re.escape(f"{flag(name)}: found {value}")) as raised:
        check_features(FEATURES, _resolved(**{name: value}), with_lora=True, on_cpu=True)
    assert feature.why in str(raised.value)


@pytest.mark.parametrize(("feature", "name", "value"), _asked(Status.SERVED))
def test_what_is_served_is_not_refused(feature: Feature, name: str, value: Any) -> None:
    check_features(FEATURES, _resolved(**{name: value}), with_lora=True, on_cpu=True)


def test_without_lora_sglangs_features_are_its_own_affair() -> None:
    check_features(FEATURES, _resolved(enable_two_batch_overlap=True), with_lora=False, on_cpu=False)
    with pytest.raises(BDLoRAError, match="--use-ray"):
        check_features(FEATURES, _resolved(use_ray=True), with_lora=False, on_cpu=False)


def test_all_faults_are_named_at_once(zoo: Zoo) -> None:
    message = _refusal(zoo.model("llama"), speculative_algorithm="NGRAM", pp_size=2, max_lora_chunk_size=128)
    flags = {line.split(":")[0] for line in message.splitlines()}
    assert flags == {"--speculative-algorithm", "--max-lora-chunk-size", "--pp-size"}


def test_every_row_names_a_test_that_there_is() -> None:
    for feature in FEATURES:
        file, _, name = feature.test.partition("::")
        path = ROOT / "tests" / "serving" / file
        assert path.is_file(), feature.name
        assert not name or f"def {name}(" in path.read_text(), feature.name


def test_every_name_is_one_of_sglangs() -> None:
    from sglang.srt.environ import envs
    from sglang.srt.runtime_context import get_platform
    from sglang.srt.server_args import ServerArgs

    for feature in FEATURES:
        for name in [*feature.off, *feature.on]:
            where = envs if name.isupper() else get_platform() if name.startswith("is_") else ServerArgs
            assert hasattr(where, name), name


def test_the_readme_shows_the_table() -> None:
    assert markdown_table(FEATURES) in (ROOT / "README.md").read_text(), (
        "python -m bdlora_sglang.serving.features README.md"
    )


@pytest.mark.parametrize(
    ("words", "yaml", "expected"),
    [
        (
            ["--enable-lora", "--enable-single-batch", "--use-ray", "--enable-dp-attention"],
            "dp-size: 2\ntp-size: 2\nenable-pdmux: true\nchunked-prefill-size: -1\n",
            [
                "--enable-single-batch-overlap: found True",
                "--use-ray: found True",
                "--attn-dp-size: found 2, expected 1",
                "--enable-pdmux: found True",
            ],
        ),
        ([], "tp-size: 5\n", ["--tp: found 5, expected a divisor of the model's 24 attention heads"]),
    ],
    ids=["abbreviated, deprecated, YAML", "degree in YAML"],
)
def test_launch_looks_at_what_was_resolved(
    zoo: Zoo, tmp_path: Path, words: list[str], yaml: str, expected: list[str]
) -> None:
    config = tmp_path / "server.yaml"
    config.write_text(yaml)
    words = ["--config", str(config), *words, "--max-lora-rank", "8", "--lora-target-modules", "all"]
    command = [sys.executable, "-m", "bdlora_cli.main", "launch", "--model", str(zoo.model("llama")), *words]
    result = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert result.returncode == 1, result.stderr[-2000:]
    lines = result.stderr.strip().splitlines()[-len(expected) :]
    found = {line.removeprefix("bdlora: ").partition(", expected")[0] for line in lines}
    assert found == {message.partition(", expected")[0] for message in expected}, lines


@pytest.mark.parametrize("words", [["--lora-backen", "csgmv"], ["--config", "{yaml}"]], ids=["abbreviated", "YAML"])
def test_a_lora_backend_is_refused_however_it_is_given(zoo: Zoo, tmp_path: Path, words: list[str]) -> None:
    from bdlora_sglang import Engine
    from bdlora_sglang.serving.launch import server_args

    config = tmp_path / "server.yaml"
    config.write_text("lora-backend: triton\n")
    with pytest.raises(BDLoRAError, match=r"--lora-backend: found '(csgmv|triton)', expected none"):
        server_args(str(zoo.model("llama")), None, [], [word.format(yaml=config) for word in words])
    with pytest.raises(BDLoRAError, match="--lora-backend: found 'csgmv', expected none"):
        Engine(model_path=str(zoo.model("llama")), lora_backend="csgmv")


def test_a_config_file_gives_sglangs_arguments_and_the_command_line_wins(zoo: Zoo, tmp_path: Path) -> None:
    from bdlora_sglang.serving.launch import server_args

    config = tmp_path / "server.yaml"
    config.write_text("tp-size: 8\nport: 31000\nmax-total-tokens: 77\n")
    arguments = server_args(str(zoo.model("llama")), None, [], ["--config", str(config), "--port", "32000"])
    assert (arguments.tp_size, arguments.port, arguments.max_total_tokens) == (8, 32000, 77)
