"""What can go wrong with documents, keys and files that others wrote."""


class ProvenanceError(Exception):
    """A document, key or file cannot be used; the message is one line and says what to do. All hostile input ends here.

    Not a ValueError: option parsers catch those and dress them up.
    """

    exit_code = 2


class ChecksFailed(ProvenanceError):
    """A document was read, but fails its checks, and what was asked for would have built on it."""

    exit_code = 1
