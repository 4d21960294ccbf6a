"""Bad adapters are refused by the project's one reader, bad options by name; neither leaves anything behind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bdlora_sglang.convert import ConvertOptions, RankChoice, bd2lora, compare_deltas, inspect_adapter, lora2bd, reblock
from bdlora_sglang.errors import AdapterError, BDLoRAError
from tests.adapter.drafts import Draft, assert_refused
from tests.adapter.test_bad_adapters import CONTRADICTIONS, OA, QB, pickle_in_place, removed, truncated
from tests.convert.oracle import CONFIG, WEIGHTS, O, Q, save_lora, snapshot

LOSSLESS = ConvertOptions(2)


def convert_every_way(source: Path, destination: Path) -> list[Callable[[], Any]]:
    return [
        lambda: bd2lora(source, destination),
        lambda: reblock(source, destination, ConvertOptions(2)),
        lambda: reblock(source, destination, ConvertOptions(2, RankChoice(rank=2))),
        lambda: inspect_adapter(source),
        lambda: list(compare_deltas(source, source)),
    ]


@pytest.mark.parametrize(
    ("spoil", "subject", "found", "expected"), [pytest.param(*v, id=n) for n, v in CONTRADICTIONS.items()]
)
def test_config_against_tensors(
    spoil: Callable[[Draft], None], subject: str, found: str, expected: str, tmp_path: Path
) -> None:
    draft = Draft()
    spoil(draft)
    source = draft.save(tmp_path / "spoilt")
    before = snapshot(tmp_path)
    for convert in convert_every_way(source, tmp_path / "out"):
        with pytest.raises(AdapterError) as caught:
            convert()
        assert_refused(caught.value, caught.value.source, subject, found, expected)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "spoil",
    [removed(CONFIG), removed(WEIGHTS), pickle_in_place, truncated(0.5), truncated(0.99), truncated(0)],
    ids=["no-config", "no-weights", "pickle", "half", "last-bytes-missing", "empty"],
)
def test_files(spoil: Callable[[Path], None], tmp_path: Path) -> None:
    source = Draft().save(tmp_path / "spoilt")
    spoil(source)
    before = snapshot(tmp_path)
    for convert in convert_every_way(source, tmp_path / "out"):
        with pytest.raises(AdapterError):
            convert()
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("name", [QB, OA], ids=["q.B", "o.A"])
def test_values_found_while_converting(name: str, value: float, tmp_path: Path) -> None:
    draft = Draft()
    draft.tensors[name][1, 1] = value
    source = draft.save(tmp_path / "spoilt")
    before = snapshot(tmp_path)
    for convert in convert_every_way(source, tmp_path / "out")[:3]:
        with pytest.raises(AdapterError) as caught:
            convert()
        assert_refused(caught.value, WEIGHTS, f"'{name}'", "1 NaN or infinite", "finite values")
    assert snapshot(tmp_path) == before


def test_too_large_for_the_new_type(tmp_path: Path) -> None:
    draft = Draft()
    draft.tensors[QB] *= 1e6
    with pytest.raises(AdapterError, match=r"q_proj.*too large for torch\.float16"):
        bd2lora(draft.save(tmp_path / "a"), tmp_path / "out", ConvertOptions(1, dtype="float16"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ConvertOptions(2, RankChoice(rank=3)), "--rank: found 3, expected a positive multiple of 2 blocks"),
        (ConvertOptions(2, RankChoice(rank=0)), "--rank: found 0"),
        (ConvertOptions(2, RankChoice(rank=2, param_ratio=1)), "--rank and --param-ratio: found both"),
        (ConvertOptions(2, RankChoice(param_ratio=-1)), "--param-ratio: found -1"),
        (ConvertOptions(2, RankChoice(param_ratio=float("nan"))), "--param-ratio: found nan"),
        (ConvertOptions(2, RankChoice(param_ratio=0.01)), "--param-ratio: found a budget of .* expected at least 256"),
        (ConvertOptions(2, RankChoice(max_error=1.5)), "--max-error: found 1.5"),
        (ConvertOptions(2, RankChoice(param_ratio=0.01, max_error=0.1)), "the budget for --max-error"),
        (ConvertOptions(1, RankChoice(rank=2)), "--nblocks: found 1, expected at least 2"),
        (ConvertOptions(0, RankChoice(rank=2)), "--rank: found 2|--nblocks: found 0"),
        (
            ConvertOptions(5, RankChoice(rank=5)),
            r"block-diagonal .\): found \d+ .*put features, expected a multiple of",
        ),
        (ConvertOptions(2), "found neither --lossless nor a rank"),
        (ConvertOptions(2, RankChoice(rank=2), dtype="int8"), "--dtype: found 'int8', expected one of float64"),
        (ConvertOptions(2, RankChoice(rank=2), compute_dtype="float16"), "--compute-dtype: found 'float16'"),
        (ConvertOptions(2, RankChoice(rank=2), device="nowhere"), "--device: found 'nowhere'"),
        (ConvertOptions(2, RankChoice(rank=2), threads=0), "--threads: found 0"),
        (ConvertOptions(2, RankChoice(rank=2), target_modules_bd_a=("q",)), f"module '{O}': found no known side"),
        (ConvertOptions(2, RankChoice(rank=2), target_modules_bd_a=("proj",), target_modules_bd_b=("q",)), "in both"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options(options: ConvertOptions, message: str, tmp_path: Path) -> None:
    source = save_lora(tmp_path / "lora", {Q: (32, 64), O: (64, 32)})
    before = snapshot(tmp_path)
    with pytest.raises(BDLoRAError, match=message):
        lora2bd(source, tmp_path / "bd", options)
    assert snapshot(tmp_path) == before


def test_unknown_module_names_the_flags(tmp_path: Path) -> None:
    source = save_lora(tmp_path / "lora", {Q: (32, 64), "model.layers.0.mixer.novel": (32, 32)})
    with pytest.raises(
        BDLoRAError, match=r"mixer\.novel.*--target-modules-bd-a .*--target-modules-bd-b .*--keep-plain"
    ):
        lora2bd(source, tmp_path / "bd", LOSSLESS, lossless=True)
    report = lora2bd(source, tmp_path / "bd", ConvertOptions(2, keep_plain=True), lossless=True)
    assert {module.name: module.nblocks for module in report.modules} == {Q: 2, "model.layers.0.mixer.novel": 1}


def test_kinds(tmp_path: Path) -> None:
    lora = save_lora(tmp_path / "lora", {Q: (32, 64), O: (64, 32)})
    lora2bd(lora, tmp_path / "bd", LOSSLESS, lossless=True)
    with pytest.raises(BDLoRAError, match="found a BD-LoRA adapter, expected LoRA; use bdlora convert reblock"):
        lora2bd(tmp_path / "bd", tmp_path / "x", LOSSLESS, lossless=True)
    with pytest.raises(BDLoRAError, match="found a LoRA adapter, expected BD-LoRA"):
        bd2lora(lora, tmp_path / "x")
    with pytest.raises(BDLoRAError, match="--lossless and a rank"):
        lora2bd(lora, tmp_path / "x", ConvertOptions(2, RankChoice(rank=2)), lossless=True)
    with pytest.raises(BDLoRAError, match="says its own sides"):
        reblock(tmp_path / "bd", tmp_path / "x", ConvertOptions(4, target_modules_bd_a=("o_proj",)))


def test_substrings_of_other_names_get_longer_patterns(tmp_path: Path) -> None:
    """GPT-NeoX: "dense", row-parallel, is a part of "dense_h_to_4h", column-parallel."""
    layer = "gpt_neox.layers.0"
    shapes = {
        f"{layer}.attention.dense": (32, 32),
        f"{layer}.mlp.dense_h_to_4h": (32, 64),
        f"{layer}.mlp.dense_4h_to_h": (64, 32),
        f"{layer}.attention.query_key_value": (32, 96),
    }
    source = save_lora(tmp_path / "lora", shapes)
    report = lora2bd(source, tmp_path / "bd", ConvertOptions(4), lossless=True)
    assert {m.name.rpartition(".")[2]: m.side.name for m in report.modules} == {
        "dense": "A", "dense_h_to_4h": "B", "dense_4h_to_h": "A", "query_key_value": "B",
    }  # fmt: skip
    assert max(difference.frobenius for difference in compare_deltas(source, tmp_path / "bd")) == 0


def test_modules_of_other_shapes_are_not_compared(tmp_path: Path) -> None:
    a = save_lora(tmp_path / "a", {Q: (32, 64)})
    b = save_lora(tmp_path / "b", {Q: (32, 32)})
    with pytest.raises(AdapterError, match=r"\(out, in\): found \(32, 32\), expected \(64, 32\)"):
        list(compare_deltas(a, b))
    assert torch.get_num_threads() == 1, "conversions give the caller's setting back"
