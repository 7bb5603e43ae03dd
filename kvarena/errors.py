"""The one error a user can cause. It stands below every package and imports nothing."""


class UserError(Exception):
    """A mistake the user can mend: the message says what was wrong, where, and what is allowed.

    The command line prints the message without a traceback and exits with status 2.
    """
