"""A kill, a full disk or an error at any moment leaves source and destination as they were."""

import json
import multiprocessing
import resource
import signal
import time
from multiprocessing.context import ForkServerProcess
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
from safetensors import safe_open

from bdlora_sglang.convert import ConvertOptions, compare_deltas, lora2bd
from bdlora_sglang.convert.folder import NewFolder
from bdlora_sglang.errors import BDLoRAError
from tests.convert.oracle import WEIGHTS, O, Q, save_lora, snapshot

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["bdlora_sglang.convert"])


def convert_forever(source: Path, destination: Path, ready: Event) -> None:
    ready.set()  # so that the kills fall into the conversion and not into the start
    while True:
        lora2bd(source, destination, ConvertOptions(2, force=True), lossless=True)


def start(source: Path, destination: Path) -> ForkServerProcess:
    ready = CONTEXT.Event()
    process = CONTEXT.Process(target=convert_forever, args=(source, destination, ready))
    process.start()
    assert ready.wait(60)
    return process


def kill(process: ForkServerProcess) -> None:
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "it had not ended by itself"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    shapes = {f"model.layers.{i}.self_attn.{name}": (64, 64) for i in range(20) for name in ("q_proj", "o_proj")}
    source = save_lora(tmp_path / "lora", shapes)
    (source / "README.md").write_text("# Mine\n")
    return source


def test_kill_at_any_moment(source: Path, tmp_path: Path) -> None:
    """Conversions over an existing destination, killed: it is whole every time, the old one or the same again."""
    place = tmp_path / "place"
    place.mkdir()
    lora2bd(source, place / "bd", ConvertOptions(2), lossless=True)
    before, source_before = snapshot(place / "bd"), snapshot(source)
    leftovers = 0
    for attempt in range(20):
        process = start(source, place / "bd")
        time.sleep(0.003 + 0.004 * attempt)
        kill(process)
        assert snapshot(place / "bd") == before
        leftovers += len(list(place.iterdir())) - 1
    assert snapshot(source) == source_before
    assert leftovers, "no kill fell into a conversion"
    lora2bd(source, place / "bd", ConvertOptions(2, force=True), lossless=True)
    assert [path.name for path in place.iterdir()] == ["bd"], "the next run clears up"


def test_kill_before_there_is_a_destination(source: Path, tmp_path: Path) -> None:
    process = start(source, tmp_path / "bd")
    while not list(tmp_path.glob(".bd.*")):  # as soon as it has begun
        pass
    kill(process)
    assert not (tmp_path / "bd").exists() or len(list(compare_deltas(source, tmp_path / "bd"))) == 40


@pytest.mark.parametrize("existing", [False, True], ids=["new", "force"])
@pytest.mark.parametrize("limit", [1000, 100_000])
def test_full_disk(limit: int, existing: bool, source: Path, tmp_path: Path) -> None:
    """A limit on the file size stands for a full disk: a write fails in the middle of the weights."""
    place = tmp_path / "place"
    place.mkdir()
    if existing:
        lora2bd(source, place / "bd", ConvertOptions(4), lossless=True)
    before = snapshot(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            lora2bd(source, place / "bd", ConvertOptions(2, force=True), lossless=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert snapshot(tmp_path) == before
    assert [path.name for path in place.iterdir()] == (["bd"] if existing else [])


def test_existing_destination(source: Path, tmp_path: Path) -> None:
    (tmp_path / "bd").mkdir()
    (tmp_path / "bd" / "precious").write_text("x")
    before = snapshot(tmp_path)
    with pytest.raises(BDLoRAError, match=r"bd: found an existing path, expected none \(or --force\)"):
        lora2bd(source, tmp_path / "bd", ConvertOptions(2), lossless=True)
    with pytest.raises(BDLoRAError, match="a multiple of --nblocks 7"):
        lora2bd(source, tmp_path / "bd", ConvertOptions(7, force=True), lossless=True)
    assert snapshot(tmp_path) == before
    lora2bd(source, tmp_path / "bd", ConvertOptions(2, force=True), lossless=True)
    assert not (tmp_path / "bd" / "precious").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bd", "lora"]


def test_destination_that_appears_meanwhile(tmp_path: Path) -> None:
    with NewFolder(tmp_path / "new", force=False) as folder:
        (folder.path / "file").write_text("ours")
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "file").write_text("theirs")
        with pytest.raises(BDLoRAError, match="an existing path"):
            folder.commit()
    assert snapshot(tmp_path) == {"new/file": b"theirs"}


def test_where_folders_cannot_be_exchanged_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other systems than Linux: two renames."""
    monkeypatch.setattr("bdlora_sglang.convert.folder._libc_renameat2", lambda: None)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "old").write_text("x")
    with NewFolder(tmp_path / "new", force=True) as folder:
        (folder.path / "file").write_text("ours")
        folder.commit()
    assert snapshot(tmp_path) == {"new/file": b"ours"}


def test_another_run_that_still_writes_is_left_alone(tmp_path: Path) -> None:
    with NewFolder(tmp_path / "new", force=False) as first:
        (first.path / "file").write_text("first")
        with NewFolder(tmp_path / "new", force=False) as second:
            assert first.path.exists() and second.path != first.path
        first.commit()
    assert snapshot(tmp_path) == {"new/file": b"first"}


@pytest.mark.parametrize("place", ["lora", "lora/bd", "."])
def test_source_and_destination_overlap(place: str, source: Path, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    with pytest.raises(BDLoRAError, match="found the source or a folder in or around it"):
        lora2bd(source, tmp_path / place, ConvertOptions(2, force=True), lossless=True)
    assert snapshot(tmp_path) == before


def test_links_to_files_are_followed(source: Path, tmp_path: Path) -> None:
    """A hub cache's snapshot is a folder of links."""
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for path in source.iterdir():
        (linked / path.name).symlink_to(path)
    lora2bd(linked, tmp_path / "bd", ConvertOptions(2), lossless=True)
    assert not any(path.is_symlink() for path in (tmp_path / "bd").iterdir())


def test_weights_are_a_safetensors_file_with_our_metadata(tmp_path: Path) -> None:
    source = save_lora(tmp_path / "lora", {Q: (32, 64), O: (64, 32)})
    lora2bd(source, tmp_path / "bd", ConvertOptions(2), lossless=True)
    with safe_open(tmp_path / "bd" / WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    record = json.loads(metadata["bdlora_convert"])
    assert (record["operation"], record["source"], record["options"]) == ("lora2bd", "lora", {"nblocks": 2})
    assert record["error"] == "0.000000e+00"
    assert {*record["module_errors"]} == {Q, O}
    assert "torch" in record["versions"]
