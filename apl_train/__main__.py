"""`python -m apl_train` and the `apl` command."""

from __future__ import annotations

import os
import sys

from apl_train.training.control import job_folder, leave_code


def main(argv: list[str] | None = None) -> int:
    from apl_train.commands.cli import main as run

    code = 1  # of an error that nobody foresaw
    try:
        code = run(argv)
    except SystemExit as ended:  # wrong usage, or --help
        code = ended.code if isinstance(ended.code, int) else 1 if ended.code else 0
        raise
    finally:
        leave_code(code)
    return code


if __name__ == "__main__":
    ended = main()
    if job_folder() is not None:  # all is written; an interpreter's own way out takes seconds with a model in memory
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ended)
    sys.exit(ended)
