"""What can stop a training run for a reason the user can act on. Each message is one line and says the way out."""


class TrainError(Exception):
    """Base of the errors below; the command line prints the message and exits with code 2.

    Not a ValueError: option parsers catch those and dress them up.
    """


class RecipeError(TrainError):
    """A recipe field has an unknown name, a wrong type or an impossible value."""


class DataError(TrainError):
    """A data file or one of its rows cannot be used; the message names the file and the line."""


class ModelError(TrainError):
    """The model or its tokenizer cannot be loaded, or do not fit each other or the data."""


class CheckpointError(TrainError):
    """A checkpoint cannot be written, or cannot be continued from."""


def one_line(error: BaseException) -> str:
    """The first sentence of another package's error, without line breaks; its type where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".:") if lines else type(error).__name__
