"""The one error a user is meant to read: what is wrong, in which file, what to do."""


class UserError(ValueError):
    """A problem with what the user gave us.

    Its message is one line; the command line prints it and exits with status 2.
    """
