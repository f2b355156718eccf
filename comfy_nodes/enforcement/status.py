"""`GET /apl/status`: what a proxy's health check, and an operator, want to know. Never a prompt, never a name."""

from __future__ import annotations

import time
from typing import Any

from ...apl_core.policy import Policy
from .guard import Guard
from .hooks import Hooks

COUNTERS = ("verified_rows", "inserted", "refused", "denied", "unsealed_refused", "negatives_plain", "negatives_kept",
            "plain_negative_rows", "consented", "unprotected_rows")


class Status:
    """The state of the enforcement in this process."""

    def __init__(self, policy: Policy, guard: Guard | None = None, hooks: Hooks | None = None) -> None:
        self.policy, self.guard, self.hooks = policy, guard, hooks
        self.began = time.time()
        self.self_test: dict[str, Any] = {"ok": False, "detail": "not run yet"}
        self.removed: list[str] = []

    def report(self) -> tuple[int, dict[str, Any]]:
        """The HTTP code (200, or 503 where the policy is not kept) and the JSON of the answer."""
        policy = self.policy
        body: dict[str, Any] = {
            "mode": policy.mode, "policy": {"sha256": policy.sha256},
            "negative": policy.negative, "unsupported": policy.unsupported, "strict": policy.strict,
            "consent": len(policy.consent.persons), "uptime_seconds": round(time.time() - self.began, 1),
        }
        if self.guard is None or self.hooks is None:
            return (503 if policy.enforced else 200), body | {"ok": not policy.enforced}
        missing = self.hooks.missing()
        counters = dict(self.guard.counters)
        ok = not missing and bool(self.self_test["ok"])
        body |= {
            "ok": ok,
            "embeddings": {
                family: {"file": pin.path.name, "sha256": pin.sha256, "tokens": self.guard.prefixes[family].num_tokens,
                         "content_sha256": self.guard.prefixes[family].content_hash}
                for family, pin in policy.embeddings.items()
            },
            "hooks": {hook.label: hook.label not in missing for hook in self.hooks.placed},
            "counters": {name: counters.get(name, 0) for name in COUNTERS},
            "self_test": self.self_test, "nodes_removed": len(self.removed),
        }
        return (200 if ok else 503), body
