"""The error that a user can mend."""


def printable(text: str) -> str:
    """The text in one line, what a terminal would act upon as Python writes it: names in files are others' words."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class UserError(ValueError):
    """Bad input, named in one sentence: operation, argument, rule and actual value.

    The command line prints the sentence alone and exits with status 2.
    """

    def __init__(self, sentence: str = "") -> None:
        super().__init__(printable(str(sentence)))
