"""What the command line prints to standard output: results that scripts read. Progress goes to standard error."""


def emit(line: str = "") -> None:
    """One line of a verb's result."""
    print(line)
