"""The base of all errors that a user can act on, and the kernels' own; the rest are in ``engine.core.errors``."""


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


class KernelError(ReelforgeError):
    """An op cannot run as asked: device, dtype, layout, size, or a pinned implementation that does not fit."""
