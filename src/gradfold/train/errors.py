"""What can stop a training run for a reason the user can act on. Each message is one line and says the way out."""


class TrainError(Exception):
    """Base of the errors below; the command line prints the message and exits with `exit_code`.

    Not a ValueError: option parsers catch those and dress them up.
    """

    exit_code = 2
    on_all_ranks = False  # whether all processes of a run raise it, so that one of them says so


class RecipeError(TrainError):
    """A recipe field has an unknown name, a wrong type or an impossible value."""


class DataError(TrainError):
    """A data file or one of its rows cannot be used; the message names the file and the line."""


class ModelError(TrainError):
    """The model or its tokenizer cannot be loaded, or do not fit each other or the data."""


class CheckpointError(TrainError):
    """A checkpoint cannot be written, or cannot be continued from."""


def one_line(error: BaseException, most: int = 200) -> str:
    """Another package's error without line breaks: its first sentence, or its type where it says nothing."""
    text = ""
    for line in str(error).splitlines():
        text = f"{text} {line.strip()}".strip()
        if text.endswith((".", "!", "?")):
            break
    text = text if len(text) <= most else text[:most].rpartition(" ")[0] + " ..."
    return text.rstrip(".:") or type(error).__name__
