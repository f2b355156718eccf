"""Who may import whom. Arrows go one way, the core needs next to nothing, and nobody but `convert` opens a pickle."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = ("apl_core", "apl_train", "comfy_nodes", "a1111_extension")
HOSTS = {"comfy", "comfy_api", "comfy_extras", "nodes", "folder_paths", "server", "modules", "modules_forge", "backend",
         "ldm_patched", "launch"}
MAY_IMPORT = {
    "apl_core": {"apl_core"},
    "apl_train": {"apl_train", "apl_core"},
    "comfy_nodes": {"comfy_nodes", "apl_core"},
    "a1111_extension": {"a1111_extension", "apl_core"},
}
CORE_NEEDS = {"torch", "safetensors", "numpy", "PIL"}
CORE_ORDER = ("errors", "families", "metadata", "prefix", "convert", "library")
ROOMS = ("model", "report", "ui", "datasets", "folder_score", "scoring", "training", "make", "baselines", "tables",
         "miniworld", "commands")
"""Folders of apl_train from the ground up."""
FILES = sorted(path for root in OURS for path in (ROOT / root).rglob("*.py"))


@dataclass(frozen=True)
class Import:
    """`module`: absolute dotted name; `is_early`: runs with the file, not in a function or for types only."""

    module: str
    is_relative: bool
    is_early: bool
    line: int

    @property
    def root(self) -> str:
        return self.module.split(".")[0]


def imports(path: Path) -> Iterator[Import]:
    """Every import of a file, those inside functions too."""
    package = path.relative_to(ROOT).parent.parts

    def walk(node: ast.AST, is_early: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, False, is_early, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            names = [[*base, node.module]] if node.module else [[*base, alias.name] for alias in node.names]
            yield from (Import(".".join(name), node.level > 0, is_early, node.lineno) for name in names)
        for child in ast.iter_child_nodes(node):
            lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
                isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
            )
            yield from walk(child, is_early and not lazy)

    yield from walk(ast.parse(path.read_text(encoding="utf-8"), str(path)), True)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_walk_sees_what_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The instrument itself: otherwise every test below could pass by seeing nothing."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "apl_core").mkdir()
    path = tmp_path / "apl_core" / "x.py"
    path.write_text(
        "import os.path, torch\nfrom . import errors, atomic\nfrom .prefix import a\nfrom ..apl_train import b\n"
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import gradio\n"
        "def f():\n    import insightface\n    class C:\n        from diffusers import d\n"
        "try:\n    import PIL\nexcept ImportError:\n    pass\n"
    )
    found = [(i.module, i.is_relative, i.is_early) for i in imports(path)]
    assert found == [
        ("os.path", False, True), ("torch", False, True), ("apl_core.errors", True, True),
        ("apl_core.atomic", True, True), ("apl_core.prefix", True, True), ("apl_train", True, True),
        ("typing", False, True), ("gradio", False, False), ("insightface", False, False), ("diffusers", False, False),
        ("PIL", False, True),
    ]
    assert len(FILES) > 10


@pytest.mark.parametrize("path", FILES, ids=name)
def test_arrows_go_one_way(path: Path) -> None:
    part = path.relative_to(ROOT).parts[0]
    for found in imports(path):
        where = f"{name(path)}:{found.line} imports {found.module}"
        if found.root in OURS:
            assert found.root in MAY_IMPORT[part], where
        if part in ("apl_core", "apl_train"):
            assert found.root not in HOSTS, f"{where}: only adapters know a host"
        if part in ("apl_core", "comfy_nodes", "a1111_extension"):
            assert found.is_relative or found.root not in OURS, f"{where}: absolute, so a host may find another's"
        if part == "apl_train" and found.root == "apl_core":
            assert not found.is_relative, f"{where}: apl_train is installed, not loaded by a host"


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name == "apl_core"], ids=name)
def test_the_core_needs_next_to_nothing(path: Path) -> None:
    for found in imports(path):
        allowed = found.root in CORE_NEEDS | {"apl_core"} or found.root in sys.stdlib_module_names
        assert allowed or not found.is_early, f"{name(path)}:{found.line} imports {found.module} at once"


def core_arrows() -> dict[str, set[str]]:
    """Module of apl_core to those of its modules that it imports at once."""
    return {
        path.stem: {i.module.split(".")[1] for i in imports(path) if i.root == "apl_core" and i.is_early}
        for path in FILES
        if path.parent.name == "apl_core" and path.stem != "__init__"
    }


def test_inside_the_core_no_module_imports_a_later_one() -> None:
    arrows = core_arrows()
    for module, needs in arrows.items():
        if module in CORE_ORDER:
            later = set(CORE_ORDER[CORE_ORDER.index(module) :])
            assert not needs & later, f"apl_core/{module}.py imports {needs & later}"
    assert arrows["errors"] == set()
    done: set[str] = set()
    while ready := {module for module, needs in arrows.items() if module not in done and needs <= done}:
        done |= ready
    assert done == set(arrows), f"imports in a circle: {set(arrows) - done}"


@pytest.mark.parametrize("path", [p for p in FILES if p.relative_to(ROOT).parts[0] == "apl_train"], ids=name)
def test_inside_apl_train_rooms_import_lower_ones_alone(path: Path) -> None:
    """Also inside functions: an arrow that runs back up is one wherever it stands."""
    parts = path.relative_to(ROOT).parts
    if len(parts) < 3 or parts[1] not in ROOMS:
        return
    for found in imports(path):
        room = found.module.split(".")[1] if found.root == "apl_train" and "." in found.module else ""
        assert room not in ROOMS[ROOMS.index(parts[1]) + 1 :], f"{name(path)}:{found.line} imports {found.module}"


def files_needed(path: Path) -> set[Path]:
    """Files that a file imports, wherever in it and for whatever: modules, packages, and modules taken out of those."""
    package, wanted = path.relative_to(ROOT).parent.parts, []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = [*(package[: len(package) - node.level + 1] if node.level else ()), *(node.module or "").split(".")]
            wanted += [base, *([*base, alias.name] for alias in node.names)]
        elif isinstance(node, ast.Import):
            wanted += [alias.name.split(".") for alias in node.names]
    places = [ROOT.joinpath(*parts) for parts in wanted]
    return {file for p in places for file in (p.with_name(f"{p.name}.py"), p / "__init__.py") if file in FILES} - {path}


def test_no_files_of_apl_train_import_each_other_in_a_circle() -> None:
    """Also inside functions and for types: two such files are one concept in two places."""
    needs = {path: files_needed(path) for path in FILES if path.relative_to(ROOT).parts[0] == "apl_train"}
    ui = ROOT / "apl_train" / "ui"
    assert {ui / "core.py", ui / "place.py", ui / "app.py"} <= needs[ui / "alone.py"], "misses relative imports"
    assert ROOT / "apl_train" / "miniworld" / "export.py" in needs[ROOT / "apl_train" / "miniworld" / "stages.py"]
    done: set[Path] = set()
    while ready := {path for path in needs if path not in done and needs[path] & set(needs) <= done}:
        done |= ready
    assert done == set(needs), f"a circle among: {sorted(name(path) for path in set(needs) - done)}"


def test_every_room_of_apl_train_has_its_floor() -> None:
    assert set(ROOMS) == {p.parent.name for p in (ROOT / "apl_train").glob("*/__init__.py")}


def test_the_root_and_the_packages_import_nothing() -> None:
    """pytest imports the root as a package, hosts import it for its entry, and nobody may pay for it."""
    for path in (ROOT / "__init__.py", ROOT / "apl_core" / "__init__.py", ROOT / "apl_train" / "__init__.py"):
        assert not [found for found in imports(path) if found.is_early and found.module != "__future__"], name(path)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_only_convert_opens_pickles_and_only_for_tensors(path: Path) -> None:
    is_convert = name(path) == "apl_core/convert.py"
    for found in imports(path):
        assert found.root not in {"pickle", "dill", "joblib", "cloudpickle", "marshal", "shelve"} or is_convert, found
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        where = f"{name(path)}:{node.lineno} calls {called}"
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called == "torch.load":
            assert is_convert and keywords.get("weights_only") == "True", where
        assert called not in {"eval", "exec", "pickle.load", "pickle.loads", "os.system", "yaml.load"}, where
        assert keywords.get("shell", "False") == "False", f"{where} through a shell"
        assert keywords.get("allow_pickle", "False") == "False", where


@pytest.mark.timeout(600)
def test_the_core_imports_where_nothing_else_is_installed() -> None:
    """A fresh interpreter that finds only torch, safetensors and numpy; Pillow too for what looks at pictures."""
    script = f"""
import importlib, sys
sys.path.insert(0, {str(ROOT)!r})
import numpy, safetensors.torch, torch
loaded = {{module.split(".")[0] for module in sys.modules}} - {{"PIL"}}
needs_pillow = set({sorted(uses_pillow())!r})

class Nothing:
    also = set()
    def find_spec(self, module, path=None, target=None):
        root = module.split(".")[0]
        if root not in loaded | sys.stdlib_module_names | {{"apl_core"}} | self.also:
            raise ImportError(f"{{module}} is not installed here")

finder = Nothing()
sys.meta_path.insert(0, finder)
modules = {sorted(core_arrows())!r}
for module in modules:
    if module not in needs_pillow:
        importlib.import_module("apl_core." + module)
finder.also = {{"PIL"}}
for module in modules:
    importlib.import_module("apl_core." + module)
bad = {{"diffusers", "transformers", "insightface", "onnxruntime", "gradio", "matplotlib", "cv2"}} & set(sys.modules)
assert not bad, bad
try:
    importlib.import_module("diffusers")
except ImportError:
    print("done", len(modules))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["done", str(len(core_arrows()))]


def uses_pillow() -> set[str]:
    """Modules of apl_core that import Pillow at once, by themselves or through others."""
    arrows = core_arrows()
    found = {path.stem for path in FILES if path.parent.name == "apl_core"
             and any(i.root == "PIL" and i.is_early for i in imports(path))}
    while more := {module for module, needs in arrows.items() if needs & found} - found:
        found |= more
    return found


def test_what_hosts_apply_prefixes_with_needs_no_pillow() -> None:
    assert not uses_pillow() & {"errors", "atomic", "families", "metadata", "prefix", "placement", "library", "convert"}
