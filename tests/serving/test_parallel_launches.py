"""Launches with several nodes and with data parallelism go through SGLang's own machinery."""

import shutil
from pathlib import Path

import pytest

from bdlora_perf.server_process import free_port, launch_command
from bdlora_perf.synthetic.reference import PeftReference
from tests.serving.server import Server, running_server
from tests.serving.zoo import PROMPTS, Zoo

NEW_TOKENS = 6


def test_two_nodes(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TP 2 over two nodes, each with folders of its own: an adapter that one node lacks is refused by both."""
    model = zoo.model("llama")
    shared = zoo.adapter(model, "bd2-r8", rank=8, nblocks=2, seed=4)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    nodes = [tmp_path / "node0", tmp_path / "node1"]
    for node in nodes:
        shutil.copytree(shared, node / "adapters" / "shared")
    shutil.copytree(shared, nodes[0] / "only-here")
    rendezvous = free_port()
    # The limit of a server that will load adapters later: the one given at start is smaller.
    limits = ("--max-lora-rank", 8, "--lora-target-modules", "all")
    # SGLang copies adapters into the pool while a batch runs.
    limits += ("--enable-lora-overlap-loading", "--max-loras-per-batch", 3, "--max-loaded-loras", 4)
    flags = (*limits, "--tp", 2, "--nnodes", 2, "--dist-init-addr", f"127.0.0.1:{rendezvous}", "--dtype", "float32")
    servers: list[Server] = []
    try:
        for rank, node in enumerate(nodes):
            port = free_port()
            roots = ("--adapter-root", node, "--adapter-root", zoo.root)
            command = launch_command(
                "--model", model, "--adapters", "adapters", "--node-rank", rank, "--port", port, *roots, *flags
            )
            log = tmp_path / f"node{rank}.log"
            servers.append(Server(command, f"http://127.0.0.1:{port}", log, folder=node))
        server = servers[0]
        server.wait_until_healthy()
        reference = PeftReference(model)
        expected = [reference.generate(PROMPTS[0], path, NEW_TOKENS).tokens for path in (shared, None)]
        assert server.generate(["shared", None], [PROMPTS[0]] * 2, NEW_TOKENS) == expected

        response = server.post("/load_lora_adapter", lora_name="lonely", lora_path="only-here")
        assert response.status_code == 400
        assert response.json()["error_message"].startswith("TP rank 1: only-here")
        assert server.adapters() == {"shared"}
        assert server.generate([None, "shared"], [PROMPTS[0]] * 2, NEW_TOKENS) == expected[::-1]

        large = server.post("/load_lora_adapter", lora_name="large", lora_path=str(zoo.adapter(model, "r9", rank=9)))
        assert large.status_code == 400
        assert "found 9, expected at most --max-lora-rank = 8" in large.json()["error_message"]
        plain = zoo.adapter(model, "plain-r8", rank=8, seed=13)
        assert server.post("/load_lora_adapter", lora_name="plain", lora_path=str(plain)).status_code == 200
        tokens = reference.generate(PROMPTS[2], plain, NEW_TOKENS).tokens
        assert server.generate(["plain"], [PROMPTS[2]], NEW_TOKENS) == [tokens]
    finally:
        for running in servers:
            running.stop()


@pytest.mark.full
def test_data_parallel_replicas(zoo: Zoo, tmp_path: Path) -> None:
    model = zoo.model("llama")
    adapters = {"bd4": zoo.adapter(model, "bd4-r8", rank=8, nblocks=4, seed=6)}
    flags = (
        "--dp-size",
        2,
        "--adapters",
        f"bd4={adapters['bd4']}",
        "--dtype",
        "float32",
        "--load-balance-method",
        "round_robin",
    )
    with running_server(model, tmp_path / "server.log", *flags) as server:
        reference = PeftReference(model)
        for prompt in PROMPTS:
            # Round robin: each replica answers both kinds.
            names: list[str | None] = [None, "bd4", "bd4", None]
            expected = [reference.generate(prompt, adapters.get(name or ""), NEW_TOKENS).tokens for name in names]
            assert [server.generate([name], [prompt], NEW_TOKENS)[0] for name in names] == expected
        for path, body in (("load", {"lora_path": str(adapters["bd4"])}), ("unload", {})):
            refused = server.post(f"/{path}_lora_adapter", lora_name="late", **body)
            assert refused.status_code == 400
            assert "--dp-size: found 2" in refused.json()["error_message"]
