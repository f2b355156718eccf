"""What all tests share: few threads, no network, nothing left behind in the user's folders."""

from __future__ import annotations

import contextlib
import os

# Set before torch is imported anywhere: tests are small, and hubs must never be asked for a missing file.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

with contextlib.suppress(ImportError):
    from hypothesis import settings

    settings.register_profile("apl", deadline=None)  # a busy machine is no bug; pytest-timeout ends what hangs
    settings.load_profile("apl")
