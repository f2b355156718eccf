"""The one tree of errors that users see. Every error says what is wrong and, in `hint`, the way out.

Hosts show both lines (a ComfyUI dialog, a red line in the WebUI); the command line prints them and exits with
`exit_code`.
"""

from __future__ import annotations


class APLError(Exception):
    """Base of every error this project raises on purpose.

    Args:
        message: what is wrong, naming the field and its value.
        hint: the way out, as an instruction.
        field: the name of the offending field, column or tensor, when there is one.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "", *, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.field = field

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class PrefixFileError(APLError):
    """An anonymization prompt file cannot be trusted, read or written."""

    exit_code = 3


class LibraryError(APLError):
    """A prefix name cannot be resolved inside the library's folders."""

    exit_code = 3


class PlacementError(APLError):
    """A prompt and a prefix cannot be laid out in the encoder's 77 positions."""

    exit_code = 4


class ConfigError(APLError):
    """A setting is missing, unknown or out of range."""

    exit_code = 2


class PolicyError(APLError):
    """What was asked for is against the policy of the host, or the host cannot keep its policy."""

    exit_code = 78


class DatasetError(APLError):
    """A dataset row, column or image is wrong."""

    exit_code = 5


class ModelError(APLError):
    """A model file is missing, of an unsupported family, or does not fit."""

    exit_code = 6


class ScoreError(APLError):
    """Scores cannot be computed from what was given."""

    exit_code = 7


class StorageError(APLError):
    """A file or folder cannot be read or written (full disk, missing permission)."""

    exit_code = 8


class TrainingError(APLError):
    """Training cannot start or go on; the last good state is kept."""

    exit_code = 9


class TrainingStopped(APLError):
    """Training was stopped by the user and saved."""

    exit_code = 130
