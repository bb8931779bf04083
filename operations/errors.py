"""Why what an operator asked for cannot be done: each says so in a sentence for people."""

from __future__ import annotations


class NotFound(Exception):
    """Raised when no email, dead letter or backup has the id."""


class NotOpen(NotFound):
    """Raised when the only dead letters with the id were replayed or discarded before."""


class NotReplayable(Exception):
    """Raised when a dead letter has nothing that could be tried again."""


class NotALimit(ValueError):
    """Raised when a limit is named that there is not, or one is to have a value that it cannot have."""


class NotAttachable(ValueError):
    """Raised when a file cannot be stored as it was asked for."""


class ServerAway(Exception):
    """Raised when PostgreSQL or RabbitMQ does not answer; `ready` tells which."""
