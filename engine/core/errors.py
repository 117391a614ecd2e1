"""Errors that a user can act on: one sentence with the offending value, one with the remedy.

Bad input raises one of these; a programmer's mistake is an ``assert``. The command line prints the
two sentences and exits with :attr:`ReelforgeError.exit_code`; a traceback means a bug in reelforge.
"""


class ReelforgeError(Exception):
    """Base of all errors that bad input or a failing environment can cause.

    Args:
        what: one sentence that names the offending value.
        hint: what to do next.
    """

    exit_code = 2

    def __init__(self, what: str, hint: str) -> None:
        super().__init__(f"{what} {hint}")
        self.what = what
        self.hint = hint


class ConfigError(ReelforgeError):
    """A recipe, an override or an argument is wrong."""


class DataError(ReelforgeError):
    """A clip, a manifest or a cache cannot be used."""


class CheckpointError(ReelforgeError):
    """A checkpoint is missing, damaged or does not fit the model."""


class StorageError(ReelforgeError):
    """The disk refused a write; what was saved before is untouched."""


class TrainingError(ReelforgeError):
    """Training cannot go on, for example because the loss is not finite."""

    exit_code = 3


class Interrupted(ReelforgeError):
    """The user or the machine asked to stop; everything up to now is saved."""

    exit_code = 130
