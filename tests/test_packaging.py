"""What is importable under which name, and that imports go down only."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Of our floors and of what they may not need, the packages that an import brings in.
_LOADED = """
import importlib, sys
for name in sys.argv[2:]:
    importlib.import_module(name)
print(*sorted({name.partition(".")[0] for name in sys.modules} & set(sys.argv[1].split(","))))
"""


def run_python(*arguments: str, cwd: Path) -> str:
    result = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def loaded(watched: str, *modules: str, cwd: Path) -> set[str]:
    return set(run_python("-c", _LOADED, watched, *modules, cwd=cwd).split())


def test_the_name_kernels_is_not_ours() -> None:
    """SGLang needs the package of that name, also where our folder is in the working directory."""
    pytest.importorskip("kernels")
    path = Path(run_python("-c", "import kernels; print(kernels.__file__)", cwd=ROOT))
    assert path.name == "__init__.py"
    assert ROOT / "kernels" not in path.parents


@pytest.mark.parametrize("name", ["bdlora_sglang", "bdlora_kernels", "bdlora_cli", "bdlora_perf"])
def test_packages_are_installed(name: str, tmp_path: Path) -> None:
    program = f"import importlib.util; print(importlib.util.find_spec({name!r}).origin)"
    assert Path(run_python("-c", program, cwd=tmp_path)).name == "__init__.py"


@pytest.mark.parametrize("name", ["cli", "perf", "tests"])
def test_folders_are_not_installed_under_their_own_names(name: str, tmp_path: Path) -> None:
    program = f"import importlib.util; print(importlib.util.find_spec({name!r}))"
    found = run_python("-c", program, cwd=tmp_path)
    assert str(ROOT / name) not in found


def test_adapters_and_conversion_do_without_sglang(tmp_path: Path) -> None:
    floors = ("bdlora_sglang.adapter", "bdlora_sglang.convert", "bdlora_kernels")
    assert loaded("sglang,transformers,peft", *floors, cwd=tmp_path) == set()


def test_kernels_know_neither_adapters_nor_sglang(tmp_path: Path) -> None:
    assert loaded("bdlora_sglang,sglang,safetensors", "bdlora_kernels", cwd=tmp_path) == set()


def test_help_does_without_sglang(tmp_path: Path) -> None:
    assert loaded("sglang,torch,transformers", "bdlora_cli.main", cwd=tmp_path) == set()
