"""The error that a user can mend."""


class UserError(ValueError):
    """Bad input, named in one sentence: operation, argument, rule and actual value.

    The command line prints the sentence alone and exits with status 2.
    """
