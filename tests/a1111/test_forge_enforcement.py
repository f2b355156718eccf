"""What users of an enforced Forge can try: the attempts of `test_webui_enforcement.py`, with Forge's own server.

`APL_ATTEMPTS=FILE` writes the table as Markdown, as there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from reference import Reference
from safetensors.torch import load_file
from test_forge import forge_reference, wide_prefix
from test_webui_enforcement import (  # noqa: F401 - collected here again
    enforced,
    test_an_attempt_is_protected,
    test_another_way_round_is_closed,
    test_the_status_tells_a_proxy_what_holds,
)
from webui_host import Server, why_no_forge

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_no_forge()), reason=why_no_forge() or "-"),
    pytest.mark.timeout(1800),
]


@pytest.fixture(scope="module")
def pinned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prefix file of the policy."""
    return wide_prefix(tmp_path_factory.mktemp("prefixes"))[0]


@pytest.fixture(scope="module")
def reference(pinned: Path) -> Reference:
    return forge_reference(load_file(pinned)["emb_params"])


@pytest.fixture(scope="module")
def server(pinned: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with enforced(tmp_path_factory.mktemp("enforced"), pinned, forge=True, wait=900) as host:
        yield host
