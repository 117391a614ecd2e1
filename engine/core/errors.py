"""Errors that a user can act on: one sentence with the offending value, one with the remedy.

Bad input raises one of these; a programmer's mistake is an ``assert``. The command line prints the
two sentences and exits with :attr:`ReelforgeError.exit_code`; a traceback means a bug in reelforge.
"""

from reelforge.kernels.errors import KernelError, ReelforgeError

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Interrupted",
    "KernelError",
    "ReelforgeError",
    "StorageError",
    "TrainingError",
]


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
