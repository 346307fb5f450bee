"""The error that a user can mend."""

# Characters of a sentence: names in files may have any length.
LONGEST = 2_000


def printable(text: str) -> str:
    """The text in one line, what a terminal would act upon as Python writes it: names in files are others' words."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class UserError(ValueError):
    """Bad input, named in one sentence: operation, argument, rule and actual value.

    The command line prints the sentence alone and exits with status 2.
    """

    def __init__(self, sentence: str = "") -> None:
        sentence = printable(str(sentence))
        if len(sentence) > LONGEST:
            # The file stands at the front, the value at the end.
            sentence = f"{sentence[: LONGEST * 3 // 4]} ... {sentence[5 - LONGEST // 4 :]}"
        super().__init__(sentence)
