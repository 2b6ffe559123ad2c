"""The one error that a user is meant to read."""


class AgileError(Exception):
    """Something a user can mend: the message names the value, what was expected and the remedy.

    The command line prints it without a traceback and exits with code 2.
    """
