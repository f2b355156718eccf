"""Single functions and classes of other tools, taken out of their source files and run with stand-ins for the rest.

A whole web interface cannot be imported for one function of twenty lines; what is run here is its text, unchanged.
"""

from __future__ import annotations
import __future__ as futures

import ast
import os
from pathlib import Path
from typing import Any

import pytest

HOSTS = Path(os.environ.get("APL_HOSTS", "~/.cache/apl-hosts")).expanduser()


def source(*candidates: str) -> Path:
    """The first of some files under the hosts' folder; skips the test where there is none."""
    for candidate in candidates:
        if (HOSTS / candidate).is_file():
            return HOSTS / candidate
    pytest.skip(f"no {candidates[0]} under {HOSTS} (see tests/contracts/README.md)")


def taken(path: Path, *names: str, **stand_ins: Any) -> dict[str, Any]:
    """The functions and classes `names` of a file, executed among `stand_ins`.

    "Class.method" takes one method out of its class. A name that the file does not have is an error, not a skip: the
    tool changed, and the contract with it.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    wanted, found = dict.fromkeys(names), []
    for node in tree.body:
        if getattr(node, "name", None) in wanted:
            found.append(node)
        if isinstance(node, ast.ClassDef):
            found += [inner for inner in node.body if f"{node.name}.{getattr(inner, 'name', '')}" in wanted]
    missing = [name for name in wanted if name.rpartition(".")[2] not in {node.name for node in found}]
    if missing:
        raise LookupError(f"{path} has no {', '.join(missing)}")
    space = dict(stand_ins)
    code = compile(ast.Module(found, type_ignores=[]), str(path), "exec", futures.annotations.compiler_flag,
                   dont_inherit=True)
    exec(code, space)  # noqa: S102 (the point of this file)
    return space
