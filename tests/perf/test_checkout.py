"""Another checkout: what this Python imports from there, and what is no such checkout."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from bdlora_perf.checkout import Surroundings, surroundings_of
from bdlora_sglang.errors import BDLoRAError

_PACKAGES = {
    "bdlora_sglang": "bdlora_sglang",
    "bdlora_kernels": "kernels/bdlora_kernels",
    "bdlora_cli": "cli/bdlora_cli",
    "bdlora_perf": "perf/bdlora_perf",
}
_PYPROJECT = """
[project]
name = "{name}"
version = "0.0.7"
[project.entry-points."sglang.srt.platforms"]
bdlora_cpu = "bdlora_sglang.old_platform:activate"
[tool.setuptools.package-dir]
"""
# A command that tells where its modules come from, in place of ``bdlora launch``.
_MAIN = """
import json, os, sys
from importlib.metadata import entry_points, version
import bdlora_kernels, bdlora_perf, bdlora_sglang
(point,) = entry_points(group="sglang.srt.platforms", name="bdlora_cpu")
print(json.dumps({
    "files": [__file__, bdlora_kernels.__file__, bdlora_perf.__file__, bdlora_sglang.__file__],
    "platform": point.load()(),
    "version": version("bdlora-sglang"),
    "arguments": sys.argv[1:],
}))
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "another checkout"
    for folder in _PACKAGES.values():
        (root / folder).mkdir(parents=True)
        (root / folder / "__init__.py").touch()
    write_project(root)
    (root / "bdlora_sglang" / "old_platform.py").write_text("def activate():\n    return 'the old platform'\n")
    (root / "cli" / "bdlora_cli" / "main.py").write_text(_MAIN)
    return root


def write_project(root: Path, name: str = "bdlora-sglang", packages: Mapping[str, str] = _PACKAGES) -> None:
    folders = "\n".join(f'{package} = "{folder}"' for package, folder in packages.items())
    (root / "pyproject.toml").write_text(_PYPROJECT.format(name=name) + folders)


def run_main(surroundings: Surroundings) -> dict[str, object]:
    command = [sys.executable, "-m", "bdlora_cli.main", "launch"]
    output = subprocess.run(
        command, env=surroundings.environment, cwd=surroundings.folder, check=True, capture_output=True, timeout=60
    ).stdout
    found: dict[str, object] = json.loads(output)
    return found


def test_everything_comes_from_there(checkout: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # What the user has on the path stays, after ours.
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "given"))
    with surroundings_of(checkout) as surroundings:
        found = run_main(surroundings)
        assert surroundings.environment["PYTHONPATH"].endswith(f":{tmp_path / 'given'}")
    files = [
        "cli/bdlora_cli/main.py",
        *(f"{_PACKAGES[name]}/__init__.py" for name in sorted(_PACKAGES) if name != "bdlora_cli"),
    ]
    assert found == {
        "files": [str(checkout / file) for file in files],
        "platform": "the old platform",
        "version": "0.0.7",
        "arguments": ["launch"],
    }
    assert not surroundings.folder.exists()


def test_a_python_that_imports_another_one_all_the_same(checkout: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "bdlora_kernels").mkdir(parents=True)
    (other / "bdlora_kernels" / "__init__.py").touch()
    # Python runs this file before anything else.
    (checkout / "sitecustomize.py").write_text(f"import sys\nsys.path.insert(0, {str(other)!r})\n")
    with (
        pytest.raises(BDLoRAError, match=r"found bdlora_kernels in .*/other/.*, expected it in .*another checkout"),
        surroundings_of(checkout),
    ):
        pass


def test_what_is_no_checkout_of_this_project(checkout: Path, tmp_path: Path) -> None:
    def refusal(folder: Path) -> str:
        with pytest.raises(BDLoRAError) as caught, surroundings_of(folder):
            pass
        return str(caught.value)

    assert "expected a checkout" in refusal(tmp_path / "missing")
    (checkout / "bdlora_sglang" / "__init__.py").unlink()
    assert "found bdlora_sglang in " in refusal(checkout)
    write_project(checkout, name="other")
    assert "found the project 'other', expected 'bdlora-sglang'" in refusal(checkout)
    (checkout / "pyproject.toml").write_text("[")
    assert "expected a checkout" in refusal(checkout)
