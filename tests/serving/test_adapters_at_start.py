"""Adapters given at the start: which folders count, and all faults of all of them before any process is started."""

import atexit
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file, save_file

from bdlora_perf.synthetic.reference import PeftReference
from bdlora_sglang.adapter.locate import adapter_folder, find_adapters
from bdlora_sglang.convert.batch import find_adapters as adapters_to_convert
from bdlora_sglang.errors import BDLoRAError
from tests.serving.zoo import PROMPTS, Zoo

NEW_TOKENS = 6


pytestmark = pytest.mark.usefixtures("same_environment")


@pytest.fixture
def good(zoo: Zoo) -> Path:
    return zoo.adapter(zoo.model("llama"), "bd2-r8", rank=8, nblocks=2, seed=4)


def _copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def test_stray_folders_are_no_adapters(good: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        _copy(good, tmp_path / name)
    for name in ("runs", "__pycache__", ".git"):
        (tmp_path / name).mkdir()
    (tmp_path / "runs" / "events.log").write_text("")
    assert [adapter.name for adapter in find_adapters([str(tmp_path)])] == ["a", "b"]
    assert [path.name for path in adapters_to_convert(tmp_path)] == ["a", "b"]


def test_checkpoints_of_a_trainer(good: Path, tmp_path: Path) -> None:
    _copy(good, tmp_path / "checkpoint-10")
    _copy(good, tmp_path / "checkpoint-20")
    assert [adapter.name for adapter in find_adapters([str(tmp_path)])] == ["checkpoint-10", "checkpoint-20"]
    for file in good.iterdir():
        shutil.copy(file, tmp_path / file.name)
    assert [adapter.path for adapter in find_adapters([str(tmp_path)])] == [str(tmp_path)]


def test_a_lone_parent_folder_is_its_adapter(good: Path, tmp_path: Path) -> None:
    lone = _copy(good, tmp_path / "all" / "sql" / "checkpoint-500")
    (named,) = find_adapters([str(tmp_path / "all")])
    assert named.name == "sql"
    assert adapter_folder(named.path) == lone == adapter_folder(str(lone.parent))
    _copy(good, lone.parent / "checkpoint-600")
    with pytest.raises(BDLoRAError, match=r"found the adapters checkpoint-500, checkpoint-600.*sql=.*checkpoint-600"):
        adapter_folder(named.path)


def test_a_folder_with_an_equals_sign_keeps_its_name(zoo: Zoo, good: Path, tmp_path: Path) -> None:
    from bdlora_sglang.serving.launch import server_args

    folder = _copy(good, tmp_path / "r=8")
    arguments = server_args(str(zoo.model("llama")), 1, find_adapters([str(folder)]), [])
    assert arguments.lora_paths == [{"lora_name": "r=8", "lora_path": str(folder)}]
    assert find_adapters([f"r8={folder}"])[0].path == str(folder)


@pytest.mark.parametrize("path", ["../base", "./base"])
def test_a_relative_path_is_never_a_repo(path: str) -> None:
    from bdlora_sglang.model_names import resolve_model

    with pytest.raises(BDLoRAError, match=f"--model {path}: found no such folder, expected a path"):
        resolve_model(path)
    with pytest.raises(BDLoRAError, match="found no such folder"):
        find_adapters([path])


@pytest.fixture
def adapters(zoo: Zoo, good: Path, tmp_path: Path) -> dict[str, Path]:
    """Two that are good among four that are not."""
    paths = {name: _copy(good, tmp_path / name) for name in ("first", "config", "nan", "last", "truncated")}
    config = json.loads((good / "adapter_config.json").read_text())
    (paths["config"] / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    weights = paths["nan"] / "adapter_model.safetensors"
    tensors = load_file(weights)
    next(tensor for name, tensor in tensors.items() if "layers.2.mlp.up_proj.lora_B" in name)[-1, -1] = float("nan")
    save_file(tensors, weights)
    os.truncate(paths["truncated"] / "adapter_model.safetensors", 3000)
    narrow = zoo.model("llama", hidden_size=48, num_attention_heads=4, num_key_value_heads=2)
    return {**paths, "other-base": zoo.adapter(narrow, "narrow", rank=8, seed=5)}


def _engine(zoo: Zoo, adapters: dict[str, Path], **arguments: Any) -> Any:
    from bdlora_sglang import Engine

    lora_paths = [f"{name}={path}" for name, path in adapters.items()]
    common = {"dtype": "float32", "skip_tokenizer_init": True, "log_level": "error"}
    return Engine(model_path=str(zoo.model("llama")), lora_paths=lora_paths, **{**common, **arguments})


def test_all_faults_are_named_before_a_process_starts(zoo: Zoo, adapters: dict[str, Path]) -> None:
    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(BDLoRAError) as raised:
        _engine(zoo, adapters)
    *lines, last = str(raised.value).splitlines()
    assert set(psutil.Process().children(recursive=True)) <= before
    expected = {
        "config": "use_dora",
        "nan": "NaN",
        "truncated": "whole safetensors",
        "other-base": "as the base model has",
    }
    assert {line.split(":")[0].strip() for line in lines} == set(expected)
    for line in lines:
        assert expected[line.split(":")[0].strip()] in line
    assert last.startswith("4 of 6 adapters cannot be served") and "--skip-bad-adapters" in last


def test_the_good_ones_are_served_without_the_bad_ones(zoo: Zoo, adapters: dict[str, Path]) -> None:
    engine = _engine(zoo, adapters, skip_bad_adapters=True)
    try:
        sampling = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
        names = [None, "first", "last"]
        answers = engine.generate(input_ids=[PROMPTS[0]] * 3, lora_path=names, sampling_params=sampling)
        reference = PeftReference(zoo.model("llama"))
        expected = [reference.generate(PROMPTS[0], adapters.get(name or ""), NEW_TOKENS).tokens for name in names]
        assert [answer["output_ids"] for answer in answers] == expected
        with pytest.raises(ValueError, match="nan"):
            engine.generate(input_ids=[PROMPTS[0]], lora_path=["nan"], sampling_params=sampling)
    finally:
        engine.shutdown()
        atexit.unregister(engine.shutdown)


def test_nothing_good_is_left(zoo: Zoo, adapters: dict[str, Path]) -> None:
    with pytest.raises(BDLoRAError, match="1 of 1 adapters cannot be served"):
        _engine(zoo, {"nan": adapters["nan"]}, skip_bad_adapters=True)


def test_a_failed_start_ends_with_its_reason(zoo: Zoo, good: Path) -> None:
    """Found by the ranks alone, after the model is loaded; the engine's process lives on."""
    with pytest.raises(BDLoRAError, match="found local rank 8"):
        _engine(zoo, {"bd2": good}, max_local_rank=1)
    assert not [child for child in psutil.Process().children(recursive=True) if "scheduler" in child.name()]


def test_a_failed_launch_ends_with_1_and_its_reason(zoo: Zoo, good: Path) -> None:
    words = ["--model", str(zoo.model("llama")), "--adapters", str(good), "--max-local-rank", "1"]
    command = [sys.executable, "-m", "bdlora_cli.main", "launch", *words]
    result = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("bdlora: adapter 'bd2-r8': found local rank 8")
