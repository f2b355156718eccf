"""Encoding with a prefix in the host is what transformers gives, in every row of the table."""

from __future__ import annotations

import pytest
from comfy_host import host_folder, run_in_host

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(host_folder() is None, reason="no ComfyUI: set COMFYUI_DIR (tests/comfy/README.md)"),
]
EXACT, POOLED = 1e-6, 1e-6  # both sides run the same kernels in float32; one rounding more is no difference


def test_states_and_pooled_are_those_of_transformers() -> None:
    found = run_in_host("parity_in_host.py", 1100)
    assert len(found["table"]) >= 24
    states, pooled = (max(each[at] for each in found["table"].values()) for at in (0, 1))
    print(f"ComfyUI {found['version']}: {len(found['table'])} rows, relative difference of states at most "  # noqa: T201
          f"{states:.1e}, of pooled {pooled:.1e}")
    far = {row: each for row, each in found["table"].items() if each[0] > EXACT or each[1] > POOLED}
    assert not far, (found["version"], far)


def test_the_comparison_sees_what_is_wrong() -> None:
    found = run_in_host("parity_in_host.py", 1100)
    assert min(found["sensitivity"].values()) > 0.05, found["sensitivity"]
