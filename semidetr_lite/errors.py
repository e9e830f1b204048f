"""Errors that a user reads: one line that says what is wrong, in which file, what to do."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A problem with the input of a user.

    Its message is one line. The commands print it and exit with status 2.
    """


class Stopped(KeyboardInterrupt):
    """A run that was stopped by Ctrl-C or SIGTERM.

    Arguments: the message to print, the exit status.
    """


@contextmanager
def as_user_error(source, problem: str) -> Iterator[None]:
    """Turn every exception of the block into one UserError: for files that others may have written.

    Args:
        source: the file that is read; the message starts with it.
        problem: what to say about it. The kind and the first line of the exception follow in
            brackets.

    Raises UserError. One that the block raises itself passes unchanged.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:100]
        raise UserError(f"{source}: {problem} ({type(error).__name__}: {reason})") from error
