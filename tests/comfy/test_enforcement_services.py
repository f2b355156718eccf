"""What an enforced server does beside other people's services: ComfyUI-Manager, and nodes that send prompts away."""

from __future__ import annotations

from pathlib import Path

import pytest
from enforced_server import Server, host_folder, make_base, serving, write_policy
from test_enforcement import NAME, Graph

pytestmark = [
    pytest.mark.skipif(host_folder() is None, reason="no ComfyUI: set COMFYUI_DIR and COMFYUI_PYTHON"),
    pytest.mark.timeout(900),
]
# What the host asks of that package while it starts; the real one need not be installed to be refused.
MANAGER = """
from aiohttp import web

def prestartup(): pass
def start(): pass
def should_be_disabled(path): return False

def create_middleware():
    @web.middleware
    async def pass_on(request, handler):
        return await handler(request)
    return pass_on
"""


def _has(word: str) -> bool:
    return word in (host_folder() / "comfy" / "cli_args.py").read_text("utf-8")


@pytest.mark.parametrize("enforced", [True, False])
def test_the_manager_and_a_policy_do_not_go_together(tmp_path: Path, enforced: bool) -> None:
    """It lets users install code. Without a policy the same command line starts."""
    if not _has("--enable-manager"):
        pytest.skip("this ComfyUI has no --enable-manager")
    package = tmp_path / "packages" / "comfyui_manager"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(MANAGER, "utf-8")
    policy = str(write_policy(tmp_path)) if enforced else None
    (tmp_path / "prefixes").mkdir(exist_ok=True)
    server = Server(tmp_path, make_base(tmp_path), policy, ["--enable-manager", "--quick-test-for-ci"],
                    path=package.parent)
    try:
        assert server.ended() == (78 if enforced else 0), server.text()[-3000:]
        assert ("ComfyUI-Manager is on, which lets users install code." in server.text()) == enforced
    finally:
        server.stop()


def test_nodes_that_send_prompts_away_are_not_offered(tmp_path: Path) -> None:
    """Even where the operator forgot --disable-api-nodes."""
    if not (host_folder() / "comfy_api_nodes").is_dir():
        pytest.skip("this ComfyUI is a copy without comfy_api_nodes")
    policy = write_policy(tmp_path)
    with serving(tmp_path, make_base(tmp_path), str(policy), api_nodes=True) as server:
        table = server.get("/object_info")
        assert "CLIPTextEncode" in table
        assert not [name for name, node in table.items() if "api_nodes" in node["python_module"]]
        removed = server.get("/apl/status")["nodes_removed"]
        name = next(line for line in server.text().splitlines() if "nodes are not offered" in line)
        assert removed > 20 and "OpenAI" in name, name
        graph = Graph()
        graph.add("OpenAIDalle3", prompt=f"a photo of {NAME}", seed=1, quality="standard", style="natural",
                  size="1024x1024")
        graph.sink(graph.encode(graph.checkpoint()[1], "a dog"))
        status, answer = server.run(graph)
        assert status == "refused" and "OpenAIDalle3" in answer, answer
