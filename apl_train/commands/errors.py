"""What went wrong, in one line and its way out, and the exit code that says so: how the command line tells errors."""

from __future__ import annotations

import re
import sys

from apl_core.errors import APLError, ConfigError, TrainingError

_NO_MEMORY = re.compile(r"out of memory|allocate memory|not enough memory", re.IGNORECASE)
_UNLOADED = re.compile(r"Failed to import|Could not import module")
"""How diffusers and transformers say that one of their modules cannot be imported, whatever the reason."""


def told(error: Exception) -> int | None:
    """Tells an error on standard error; returns its exit code, or None where it is a fault of the program itself."""
    if isinstance(error, APLError):
        return _refused(error)
    if isinstance(error, ImportError):
        missing = ConfigError(f"{error.name or error} is not installed.",
                              "Install what this command needs: pip install '.[demo]' in the checkout")
        return _misfit() or _refused(missing)
    if not isinstance(error, MemoryError | RuntimeError):  # CUDA's, Apple's and the CPU's own are all RuntimeErrors
        return None
    if _UNLOADED.search(str(error)) and (code := _misfit()):
        return code
    if not isinstance(error, MemoryError) and not _NO_MEMORY.search(str(error)):
        return None
    return _refused(TrainingError("The memory of this device ran out.",
                                  "Use the preset sd15-8gb or a smaller batch_size, and close other programs. What was "
                                  "saved is kept: the same command, or `apl resume`, goes on."))


def _refused(error: APLError) -> int:
    """Tells an error and its way out; returns the exit code."""
    sys.stderr.write(f"error: {error.message}\n")
    if error.hint:
        sys.stderr.write(f"       {error.hint}\n")
    return error.exit_code


def _misfit() -> int:
    """Tells which package keeps the libraries from being imported; 0 where it is none of the known ones."""
    from apl_train.commands.doctor import misfits

    found = list(misfits().values())
    if not found:
        return 0
    message, _, way_out = found[0].partition("  ->  ")
    return _refused(ConfigError(f"{message}.", f"{way_out}. `apl doctor` tells the same."))
