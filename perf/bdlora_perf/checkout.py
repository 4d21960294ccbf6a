"""Running another checkout of this project with this Python, beside the installed one.

Its folders go first on PYTHONPATH, before the finders of an editable install. The entry points through which SGLang
finds the platform are the checkout's own, too: they stand in a made-up ``*.dist-info`` that comes first of all, and of
two distributions of one name ``importlib.metadata`` takes the first.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bdlora_sglang.errors import BDLoRAError

_PROJECT = "bdlora-sglang"
_PROBE_SECONDS = 120
# Finds packages as an import would, and imports none of them.
_PROBE = """
import json, sys
from importlib.metadata import entry_points
from importlib.util import find_spec
names, groups = json.loads(sys.argv[1])
specs = {name: find_spec(name) for name in names}
print(json.dumps([
    {name: spec and spec.origin for name, spec in specs.items()},
    {group: [[point.name, point.value] for point in entry_points(group=group)] for group in groups},
]))
"""


@dataclass(frozen=True)
class Surroundings:
    """What a process needs to run a checkout: its environment, and the ``folder`` to start it in.

    ``python -m`` looks for modules in the folder it is started in first, so that must not be a checkout.
    """

    environment: Mapping[str, str]
    folder: Path


@dataclass(frozen=True)
class _Project:
    """Of a pyproject.toml: version, the folder of each package, and entry points by group."""

    version: str
    packages: Mapping[str, Path]
    entry_points: Mapping[str, Mapping[str, str]]


@contextmanager
def surroundings_of(checkout: Path) -> Iterator[Surroundings]:
    """Make what it takes to run ``checkout``; it is there, in a temporary folder, until the context ends.

    Raises:
        BDLoRAError: no checkout of this project, or this Python would import another one in spite of all.
    """
    checkout = checkout.resolve()
    project = _read_project(checkout)
    with tempfile.TemporaryDirectory(prefix="bdlora-before-") as name:
        folder = Path(name).resolve()
        _write_metadata(folder, project)
        first = dict.fromkeys([folder, *(package.parent for package in project.packages.values())])
        given = os.environ.get("PYTHONPATH")
        path = os.pathsep.join([*map(str, first), *([given] if given else [])])
        surroundings = Surroundings({**os.environ, "PYTHONPATH": path}, folder)
        _check(checkout, project, surroundings)
        yield surroundings


def _read_project(checkout: Path) -> _Project:
    file = checkout / "pyproject.toml"
    try:
        content: dict[str, Any] = importlib.import_module("tomllib").loads(file.read_text(encoding="utf-8"))
    except ImportError as error:
        raise BDLoRAError(
            f"--before {checkout}: found Python {sys.version.split()[0]}, expected 3.11 or newer"
        ) from error
    except (OSError, ValueError) as error:
        raise BDLoRAError(f"--before {checkout}: found no {file} to read ({error}), expected a checkout") from error
    project = content.get("project", {})
    folders = content.get("tool", {}).get("setuptools", {}).get("package-dir", {})
    packages = {name: checkout / folder for name, folder in folders.items()}
    if project.get("name") != _PROJECT or "bdlora_cli" not in packages:
        raise BDLoRAError(f"--before {checkout}: found the project {project.get('name')!r}, expected {_PROJECT!r}")
    return _Project(str(project.get("version", "0")), packages, project.get("entry-points", {}))


def _write_metadata(folder: Path, project: _Project) -> None:
    metadata = folder / f"{_PROJECT.replace('-', '_')}-{project.version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {_PROJECT}\nVersion: {project.version}\n")
    groups = [
        "\n".join([f"[{group}]", *(f"{name} = {value}" for name, value in points.items())])
        for group, points in project.entry_points.items()
    ]
    (metadata / "entry_points.txt").write_text("\n\n".join(groups) + "\n")


def _check(checkout: Path, project: _Project, surroundings: Surroundings) -> None:
    """Ask a process in these surroundings where it would import from; raises `BDLoRAError` for anywhere else."""
    asked = json.dumps([list(project.packages), list(project.entry_points)])
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, asked],
        env=surroundings.environment,
        cwd=surroundings.folder,
        capture_output=True,
        text=True,
        timeout=_PROBE_SECONDS,
    )
    if done.returncode != 0:
        raise BDLoRAError(f"--before {checkout}: found that this Python does not run there:\n{done.stderr.strip()}")
    origins, groups = json.loads(done.stdout.splitlines()[-1])
    for name, package in project.packages.items():
        if origins[name] is None or Path(origins[name]).resolve().parent != package.resolve():
            raise BDLoRAError(f"--before {checkout}: found {name} in {origins[name]}, expected it in {package}")
    for group, points in project.entry_points.items():
        found = sorted(value for name, value in groups[group] if name in points)
        if found != sorted(points.values()):
            raise BDLoRAError(
                f"--before {checkout}: found the entry points {found} of {group}, expected {sorted(points.values())}"
            )
