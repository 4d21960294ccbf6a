"""Bad adapters on a running server: the message says what is wrong, and the server goes on as if nothing had been."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.serving.api.served import NEW_TOKENS, Served
from tests.serving.zoo import PROMPTS, Zoo


def _edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def _edit_tensors(folder: Path, edit: Any) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name: edit(name, tensor).contiguous() for name, tensor in load_file(path).items()}, path)


def _truncate(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    os.truncate(path, path.stat().st_size // 2)


def _rename_layer(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name.replace("layers.2.", "layers.7."): tensor for name, tensor in load_file(path).items()}, path)


def _add_output_head(folder: Path) -> None:
    _edit_config(folder, target_modules=["lm_head"], use_bdlora=None)
    names = ("base_model.model.lm_head.lora_A.weight", "base_model.model.lm_head.lora_B.weight")
    save_file(
        dict(zip(names, (torch.ones(8, 96), torch.ones(512, 8)), strict=True)), folder / "adapter_model.safetensors"
    )


def _wrong_width(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:, :-4] if "layers.1.mlp.up_proj.lora_A" in name else tensor


REFUSALS = {
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), ["adapter_config.json", "no such file"]),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), ["adapter_model.safetensors"]),
    "pickle": (
        lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
        ["adapter_model.bin", "pickle"],
    ),
    "truncated": (_truncate, ["adapter_model.safetensors", "whole safetensors file"]),
    "type": (lambda folder: _edit_config(folder, peft_type="IA3"), ["peft_type", "IA3", "LORA"]),
    "dora": (lambda folder: _edit_config(folder, use_dora=True), ["use_dora", "DoRA"]),
    "blocks": (
        lambda folder: _edit_config(folder, use_bdlora={**_BD_FIELDS, "nblocks": 3}),
        ["nblocks = 3", "found 8"],
    ),
    "shape": (lambda folder: _edit_config(folder, r=16, rank_pattern={}), ["lora_A.weight", "(16, *)"]),
    "nan": (
        lambda folder: _edit_tensors(
            folder, lambda name, tensor: tensor * float("nan") if "q_proj" in name else tensor
        ),
        ["q_proj", "NaN"],
    ),
    "other base model": (lambda folder: _edit_tensors(folder, _wrong_width), ["up_proj.lora_A", "found 92", "96"]),
    "output head": (_add_output_head, ["lm_head", "--lora-target-modules"]),
    "added tokens": (
        lambda folder: (folder / "added_tokens.json").write_text('{"<new>": 512}'),
        ["add tokens to the vocabulary"],
    ),
    "unknown module": (_rename_layer, ["layers.7.", "layers 0 to 2"]),
}
_BD_FIELDS = {
    "target_modules_bd_a": ["o_proj", "down_proj"],
    "target_modules_bd_b": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"],
}


@pytest.mark.parametrize("damage", REFUSALS)
def test_refusals_name_what_is_wrong_and_change_nothing(served: Served, tmp_path: Path, damage: str) -> None:
    edit, words = REFUSALS[damage]
    folder = tmp_path / "damaged"
    shutil.copytree(served.adapters["bd4-r8"], folder)
    edit(folder)
    before = served.server.adapters()
    response = served.load("damaged", folder)
    assert response.status_code == 400
    for word in words:
        assert word in response.json()["error_message"], response.text
    assert served.server.adapters() == before
    served.check(["bd4-r8", None], [PROMPTS[0], PROMPTS[0]])


@pytest.mark.parametrize(
    ("name", "path", "words"),
    [
        ("a\nb", None, ["adapter name", "printable"]),
        ("bd2-r8", None, ["bd2-r8", "already loaded"]),
        ("missing", "no/such/adapter", ["no/such/adapter"]),
        ("too-large", {"rank": 48}, ["local rank 48", "--max-local-rank 48"]),
    ],
    ids=["name", "duplicate", "missing", "too large"],
)
def test_refused_loads(served: Served, zoo: Zoo, name: str, path: Any, words: list[str]) -> None:
    if isinstance(path, dict):
        path = zoo.adapter(served.model, "too-large", seed=77, **path)
    response = served.load(name, path or served.adapters["bd2-r8"])
    assert response.status_code == 400
    for word in words:
        assert word in response.text
    served.check(["bd2-r8"], [PROMPTS[0]])


def test_an_adapter_that_fails_on_one_rank_fails_on_all(served: Served, tmp_path: Path) -> None:
    """Infinity in rank 1's block alone; requests in flight are answered right, and the repaired adapter loads."""
    folder = tmp_path / "half-broken"
    shutil.copytree(served.adapters["bd2-r8"], folder)

    def spoil_last_row(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if "layers.2.mlp.gate_proj.lora_B" in name:
            tensor[-1] = float("inf")
        return tensor

    _edit_tensors(folder, spoil_last_row)
    with ThreadPoolExecutor(4) as clients:
        in_flight = [clients.submit(served.check, ["bd4-r8", None], [PROMPTS[2]] * 2, 40) for _ in range(4)]
        response = served.load("half-broken", folder)
        for request in in_flight:
            request.result()
    assert response.status_code == 400
    message = response.json()["error_message"]
    assert message.startswith("TP rank 1:") and "layers.2.mlp.gate_proj.lora_B" in message
    assert "half-broken" not in served.server.adapters()
    shutil.copy(served.adapters["bd2-r8"] / "adapter_model.safetensors", folder)
    assert served.load("half-broken", folder).status_code == 200
    expected = served.expected(served.adapters["bd2-r8"], PROMPTS[0])
    assert served.server.generate(["half-broken"], [PROMPTS[0]], NEW_TOKENS) == [expected]
    assert served.unload("half-broken").status_code == 200
