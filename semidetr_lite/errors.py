"""The one error a user is meant to read: what is wrong, in which file, what to do."""

from contextlib import contextmanager


class UserError(ValueError):
    """A problem with what the user gave us.

    Its message is one line; the command line prints it and exits with status 2.
    """


class Stopped(KeyboardInterrupt):
    """A run was asked to stop, by Ctrl-C or SIGTERM: `Stopped(what to say, exit status)`."""


@contextmanager
def reading(file, fault: str):
    """While a file is read that others may have written: whatever goes wrong is a UserError naming it."""
    try:
        yield
    except UserError:
        raise
    except Exception as problem:
        reason = (str(problem).splitlines() or [""])[0][:100]
        raise UserError(f"{file}: {fault} ({type(problem).__name__}: {reason})") from problem
