"""`python -m apl_train` and the `apl` command."""

from __future__ import annotations

import sys


def main(argv: list[str] | None = None) -> int:
    from apl_train.cli import main as run

    return run(argv)


if __name__ == "__main__":
    sys.exit(main())
