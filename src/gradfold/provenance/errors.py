"""Exceptions for unusable documents, keys and files."""


class ProvenanceError(Exception):
    """A document, key or file cannot be used; the message is one line and says what to do.

    All hostile input ends in this exception. It is not a ValueError, because option parsers catch those.
    """

    exit_code = 2


class ChecksFailed(ProvenanceError):
    """A document was read but fails its checks, and the requested action would build on it."""

    exit_code = 1
