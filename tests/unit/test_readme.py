"""Every command in the documents parses, and every link and picture in them leads somewhere."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from apl_core.errors import ConfigError
from apl_train.commands import cli

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ("README.md", "embeddings/README.md", "docs/your-model.md")
COMMAND = re.compile(r"^(apl|python install\.py) ")
LATER = {"docs/figures/before-after.png"}
"""Made from the shipped model; missing only as long as that is."""


def commands(text: str) -> list[str]:
    """Command lines in `code`, in fenced and in indented blocks."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.S | re.M)
    found = [line.strip() for block in fenced for line in block.splitlines()]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    found += [line.strip() for line in re.findall(r"^(?: {4}|\t)(.*)$", prose, re.M)]
    found += re.findall(r"`([^`\n]+)`", prose)
    return [line for line in found if COMMAND.match(line)]


def links(text: str) -> list[str]:
    """Targets of links and pictures that stay in the repository, without their anchors."""
    found = re.findall(r"\]\(([^)\s]+)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    return [target.partition("#")[0] for target in found if not re.match(r"[a-z]+:|#", target)]


def parse(line: str) -> None:
    """Raises SystemExit or ConfigError when a command line would be refused."""
    words = shlex.split(line)
    if words[0] == "python":
        spec = importlib.util.spec_from_file_location("apl_install_under_test", ROOT / "install.py")
        install = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(install)
        if words[2] not in install.EXTRAS:
            raise SystemExit(2)
        if words[2] == "test":
            return
        words = words[1:]
    argv = words[1:]
    cli._parsers(cli._preset_of(argv) if argv[0] == "train" else {})[0].parse_args(argv)


EVERY = [pytest.param(line, id=f"{name}: {line}") for name in DOCUMENTS
         for line in commands((ROOT / name).read_text(encoding="utf-8"))]


def test_the_instruments_see_what_they_should() -> None:
    text = ("Use `apl doctor` or `apl`.\n```sh\n$ no\napl claims --json\n```\n\n    apl inspect FILE\n\n"
            "| `python install.py demo` | x |\n"
            "[a](docs/a.md#part) ![b](b.png) [c](https://example.org) [d](#top) <img src=\"d.png\">\n")
    assert commands(text) == ["apl claims --json", "apl inspect FILE", "apl doctor", "python install.py demo"]
    assert links(text) == ["docs/a.md", "b.png", "d.png"]
    assert len(EVERY) > 8


@pytest.mark.parametrize("line", EVERY)
def test_every_command_parses(line: str) -> None:
    parse(line)


@pytest.mark.parametrize("line", [
    "apl nope", "apl score --nope 1", "apl train --base-model x", "apl train --preset nope", "apl convert FILE",
    "python install.py nope", "python install.py demo --nope",
])
def test_a_wrong_command_would_be_seen(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((SystemExit, ConfigError)):
        parse(line)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_leads_somewhere(name: str) -> None:
    document = ROOT / name
    found = links(document.read_text(encoding="utf-8"))
    assert found or name != "README.md"
    for target in found:
        if target in LATER and not (ROOT / "apl_train" / "miniworld" / "assets" / "model").exists():
            continue
        path = (document.parent / target).resolve()
        assert path.is_relative_to(ROOT) and path.exists(), f"{name} points at {target}"
