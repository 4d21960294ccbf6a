import shutil
from collections.abc import Iterator

import pytest

from tests.serving.api.served import SLOTS, TP, Served
from tests.serving.server import running_server
from tests.serving.zoo import Zoo

FLAGS = (
    *("--dtype", "float32", "--max-running-requests", 16, "--chunked-prefill-size", 32, "--enable-metrics"),
    # JSON may have any white space between its tokens, and a random model goes on with it for ever.
    "--constrained-json-disable-any-whitespace",
    # One whose calls, required or named, are JSON that follows the tool's schema.
    *("--tool-call-parser", "pythonic"),
)


@pytest.fixture(scope="package")
def served(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    model = zoo.model("llama")
    adapters = zoo.adapters(model)
    # Nothing but the adapters in the folder that --adapters names.
    folder = tmp_path_factory.mktemp("adapters")
    for name, path in adapters.items():
        shutil.copytree(path, folder / name)
    log = tmp_path_factory.mktemp("server") / "server.log"
    # Tests load adapters that they make themselves.
    root = tmp_path_factory.getbasetemp()
    flags = ("--tp", TP, "--adapters", folder, "--adapter-root", root, "--max-loras-per-batch", SLOTS, *FLAGS)
    with running_server(model, log, *flags) as server:
        yield Served(server, model, {name: folder / name for name in adapters})
