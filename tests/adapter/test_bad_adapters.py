"""Adapters that cannot be used: each is refused with the file, the tensor or field, what is there, what should be."""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from bdlora_sglang.adapter import Adapter, ModuleShard, read_slice, slice_module
from bdlora_sglang.errors import AdapterError
from tests.adapter.drafts import CONFIG, WEIGHTS, Draft, O, Q, assert_refused

NESTED_TOO_DEEPLY = b"[" * 100_000


def test_the_draft_is_good(tmp_path: Path) -> None:
    adapter = Adapter.open(Draft().save(tmp_path / "adapter"))
    assert (adapter.kind, adapter.nblocks, adapter.max_rank) == ("BD-LoRA", 4, 8)
    assert adapter.num_parameters == sum(tensor.numel() for tensor in Draft().tensors.values())


# --- Files ---------------------------------------------------------------------------------------------------------


def no_folder(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def pickle_in_place(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save(Draft().tensors, folder / "adapter_model.bin")


def folder_in_place(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


def truncated(bytes_kept: float) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        whole = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(whole[: int(len(whole) * bytes_kept)])

    return spoil


def written(name: str, content: bytes) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return spoil


def removed(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("spoil", "source", "subject", "found", "expected"),
    [
        pytest.param(no_folder, "adapter", "adapter", "no such folder", CONFIG, id="no-folder"),
        pytest.param(removed(CONFIG), CONFIG, "adapter config", "no such file", "PEFT", id="no-config"),
        pytest.param(removed(WEIGHTS), WEIGHTS, "adapter weights", "no such file", "safetensors", id="no-weights"),
        pytest.param(pickle_in_place, "adapter_model.bin", "weights", "a pickle", WEIGHTS, id="pickle"),
        pytest.param(folder_in_place, WEIGHTS, "weights", "no such file", "safetensors", id="weights-are-a-folder"),
        pytest.param(truncated(0.5), WEIGHTS, "weights", "", "a whole safetensors file", id="half-the-weights"),
        pytest.param(truncated(0.99), WEIGHTS, "weights", "", "a whole safetensors file", id="last-bytes-missing"),
        pytest.param(truncated(0), WEIGHTS, "weights", "", "a whole safetensors file", id="empty-weights"),
        pytest.param(written(WEIGHTS, b"\xff" * 64), WEIGHTS, "weights", "", "whole safetensors", id="garbage-weights"),
        pytest.param(written(CONFIG, b'{"r": 8,'), CONFIG, "config", "line 1", "a JSON object", id="corrupt-json"),
        pytest.param(written(CONFIG, b""), CONFIG, "config", "line 1", "a JSON object", id="empty-config"),
        pytest.param(written(CONFIG, b"[8]"), CONFIG, "config", "list", "a JSON object", id="json-list"),
        pytest.param(written(CONFIG, b"\xff\xfe{}"), CONFIG, "config", "utf-8", "a JSON object", id="not-utf-8"),
        pytest.param(
            written(CONFIG, NESTED_TOO_DEEPLY), CONFIG, "config", "recursion", "a JSON object", id="deep-json"
        ),
    ],
)
def test_files(
    spoil: Callable[[Path], None], source: str, subject: str, found: str, expected: str, tmp_path: Path
) -> None:
    folder = Draft().save(tmp_path / "adapter")
    spoil(folder)
    with pytest.raises(AdapterError) as caught:
        Adapter.open(folder)
    assert_refused(caught.value, source, subject, found, expected)


def test_pickle_is_not_opened(tmp_path: Path) -> None:
    """Not even a look: opening a pickle runs what is in it."""
    folder = Draft().save(tmp_path / "adapter")
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    with pytest.raises(AdapterError, match="pickles are refused"):
        Adapter.open(folder)
    assert not (tmp_path / "ran").exists()


def test_pickle_beside_safetensors_is_ignored(tmp_path: Path) -> None:
    folder = Draft().save(tmp_path / "adapter")
    torch.save({}, folder / "training_args.bin")
    assert Adapter.open(folder).modules


# --- The config against the tensors ---------------------------------------------------------------------------------

QA, QB, OA, OB = (f"{module}.lora_{factor}.weight" for module in (Q, O) for factor in "AB")


def tensor(name: str, value: torch.Tensor | None) -> Callable[[Draft], None]:
    def spoil(draft: Draft) -> None:
        draft.tensors.pop(name, None)
        if value is not None:
            draft.tensors[name] = value

    return spoil


def config(**fields: object) -> Callable[[Draft], None]:
    return lambda draft: draft.config.update(fields)


def bdlora(**fields: object) -> Callable[[Draft], None]:
    return lambda draft: draft.config["use_bdlora"].update(fields)


def no_tensors(draft: Draft) -> None:
    draft.tensors.clear()


EMBED = "base_model.model.model.embed_tokens"


def _embedding(rank: int) -> dict[str, torch.Tensor]:
    return {
        f"{EMBED}.lora_embedding_A": torch.ones(rank, 20),
        f"{EMBED}.lora_embedding_B": torch.ones(32, rank),
    }


def embedding_of_rank_9(draft: Draft) -> None:
    draft.tensors.update(_embedding(9))
    draft.config["target_modules"].append("embed_tokens")


CONTRADICTIONS = {
    "rank-not-divisible": (bdlora(nblocks=3), "rank of module", "8", "a multiple of use_bdlora.nblocks = 3"),
    "pattern-rank-not-divisible": (config(rank_pattern={"o_proj": 6}), "rank of module", "6", "nblocks = 4"),
    "rank-of-A": (config(r=16), f"'{OA}' shape", "(8, 16)", "(16, *)"),
    "rank-of-B": (tensor(OB, torch.ones(32, 16)), f"'{OB}' shape", "(32, 16)", "(*, 8)"),
    "block-rank-of-B": (tensor(QB, torch.ones(64, 8)), f"'{QB}' shape", "(64, 8)", "(*, 2)"),
    "other-block-count": (bdlora(nblocks=2), f"'{QB}' shape", "(64, 2)", "(*, 4)"),
    "blocks-do-not-divide-B": (tensor(QB, torch.ones(62, 2)), f"'{QB}' shape", "(62, 2)", "rows that 4 blocks divide"),
    "plain-config-for-blocks": (config(use_bdlora=None), f"'{QB}' shape", "(64, 2)", "(*, 8)"),
    "one-dimension": (tensor(QA, torch.ones(8)), f"'{QA}' shape", "(8,)", "(8, *)"),
    "three-dimensions": (tensor(QA, torch.ones(8, 32, 1)), f"'{QA}' shape", "(8, 32, 1)", "(8, *)"),
    "no-columns": (tensor(QA, torch.ones(8, 0)), f"'{QA}' shape", "(8, 0)", "(8, *)"),
    "integers": (tensor(QA, torch.ones(8, 32, dtype=torch.int32)), f"'{QA}' dtype", "", "16"),
    "float8": (tensor(QA, torch.ones(8, 32).to(torch.float8_e4m3fn)), f"'{QA}' dtype", "", "16"),
    "no-B": (tensor(QB, None), "module 'model.layers.0.self_attn.q_proj'", "no lora_B.weight", "both"),
    "no-A": (tensor(OA, None), "module 'model.layers.0.self_attn.o_proj'", "no lora_A.weight", "both"),
    "no-tensors": (no_tensors, "adapter weights", "no LoRA tensors", "lora_A.weight"),
    "matches-no-side": (bdlora(target_modules_bd_a=["down_proj"]), "o_proj'", "no match in", "match_strict: false"),
    "matches-both-sides": (bdlora(target_modules_bd_a=["proj"]), "proj'", "a match in both", "one of them"),
    "dora-magnitude": (
        tensor(f"{Q}.lora_magnitude_vector", torch.ones(64)), "lora_magnitude_vector'", "not LoRA", "no DoRA",
    ),
    "embedding-of-another-rank": (
        embedding_of_rank_9, "embedding_A' shape", "(9, 20)", "(8, *)",
    ),
    "no-B-of-an-embedding": (
        tensor(f"{EMBED}.lora_embedding_A", torch.ones(8, 20)), "embed_tokens'", "no lora_B", "both factors",
    ),
    "bias-of-B": (tensor(f"{Q}.lora_B.bias", torch.ones(64)), "lora_B.bias'", "not LoRA", "bias"),
    "duplicate": (tensor(f"{Q}.lora_A.default.weight", torch.ones(8, 32)), f"'{QA}'", "a duplicate", "one of them"),
}  # fmt: skip


@pytest.mark.parametrize("in_memory", [False, True], ids=["file", "tensors"])
@pytest.mark.parametrize(
    ("spoil", "subject", "found", "expected"), [pytest.param(*v, id=n) for n, v in CONTRADICTIONS.items()]
)
def test_config_against_tensors(
    spoil: Callable[[Draft], None], subject: str, found: str, expected: str, in_memory: bool, tmp_path: Path
) -> None:
    draft = Draft()
    spoil(draft)
    if in_memory:
        load = partial(Adapter.from_tensors, draft.tensors, draft.config, "spoilt")
    else:
        load = partial(Adapter.open, draft.save(tmp_path / "spoilt"))
    with pytest.raises(AdapterError) as caught:
        load()
    source = caught.value.source
    assert source == "spoilt" if in_memory else source in {str(tmp_path / "spoilt" / n) for n in (CONFIG, WEIGHTS)}
    assert_refused(caught.value, source, subject, found, expected)


# --- Values ---------------------------------------------------------------------------------------------------------


def read_all(adapter: Adapter, dtype: torch.dtype = torch.float32) -> None:
    for module in adapter.modules.values():
        for part in slice_module(module, ModuleShard(range(module.in_features), range(module.out_features))):
            read_slice(adapter, part, dtype)


@pytest.mark.parametrize("in_memory", [False, True], ids=["file", "tensors"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("name", [QA, QB, OA, OB], ids=["q.A", "q.B", "o.A", "o.B"])
def test_values_that_are_not_finite(name: str, value: float, in_memory: bool, tmp_path: Path) -> None:
    draft = Draft()
    draft.tensors[name][-1, -1] = value
    if in_memory:
        adapter = Adapter.from_tensors(draft.tensors, draft.config, "spoilt")
    else:
        adapter = Adapter.open(draft.save(tmp_path / "spoilt"))
    with pytest.raises(AdapterError) as caught:
        read_all(adapter)
    source = "spoilt" if in_memory else str(tmp_path / "spoilt" / WEIGHTS)
    assert_refused(caught.value, source, f"tensor '{name}'", "1 NaN or infinite", "finite")


def test_value_too_large_for_the_type_it_is_served_in() -> None:
    draft = Draft()
    draft.tensors[OB][0, 0] = 1e6
    adapter = Adapter.from_tensors(draft.tensors, draft.config, "spoilt")
    read_all(adapter, torch.bfloat16)
    with pytest.raises(AdapterError) as caught:
        read_all(adapter, torch.float16)
    assert_refused(caught.value, "spoilt", f"tensor '{OB}'", "1000000", "float16")


def test_errors_survive_the_way_to_another_process() -> None:
    error = AdapterError("file", "tensor 't'", (1, 2), "(2, 1)")
    copies = pickle.loads(pickle.dumps(error)), copy.copy(error)
    assert all(
        type(other) is AdapterError and str(other) == str(error) and vars(other) == vars(error) for other in copies
    )
