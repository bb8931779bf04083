"""What can go wrong with an attachment, and what of the network's failures becomes of it."""

from __future__ import annotations

import http.client
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta


class AttachmentError(Exception):
    """An attachment could not be read."""


class AttachmentRefused(AttachmentError):
    """Trying again will not help: the publisher or the operator has to change something."""


class InvalidSource(AttachmentRefused):
    """The ``urlOrId`` is neither a usable ``https`` URL nor the id of a stored attachment."""


class SourceForbidden(AttachmentRefused):
    """The URL, or a redirect, leads where this installation does not fetch from."""


class SourceGone(AttachmentRefused):
    """The source is there and does not hand out the attachment: 403, 404, 410 or another final answer."""


class NotStored(AttachmentRefused):
    """No attachment is stored under the id: none ever was, or it has expired, or its mails were done."""


class Damaged(AttachmentRefused):
    """A stored attachment is not what was stored, or its key is gone."""


class SizeMismatch(AttachmentRefused):
    """The source has another number of bytes than the publisher declared."""


class TooLarge(AttachmentRefused):
    """The attachment is larger than this installation accepts."""


class SourceUnavailable(AttachmentError):
    """The source failed for now; ``retry_after`` is how long it asked to be left alone, if it did."""

    def __init__(self, message: str, retry_after: timedelta | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class SourceChanged(SourceUnavailable):
    """The source has another file by now than the one whose first bytes were read: begin at the first byte."""


class StoreUnavailable(SourceUnavailable):
    """The store of attachments cannot be reached or does not let us in."""


class TypeMismatch(AttachmentRefused):
    """The source has another type of file than the publisher declared."""


@contextmanager
def unavailable_on_failure(origin: str) -> Iterator[None]:
    """Raise what fails on the way to the origin as `SourceUnavailable`."""
    try:
        yield
    except ssl.SSLCertVerificationError as exc:
        raise SourceUnavailable(f"{origin} has no trusted certificate for its name") from exc
    except socket.gaierror as exc:
        raise SourceUnavailable(f"{origin} has a name that does not resolve") from exc
    except TimeoutError as exc:
        raise SourceUnavailable(f"{origin} took too long") from exc
    except OSError as exc:
        raise SourceUnavailable(f"{origin} cannot be reached, or broke off ({type(exc).__name__})") from exc
    except http.client.HTTPException as exc:  # from None, because these texts quote what the source sent
        raise SourceUnavailable(f"{origin} broke off or does not speak HTTP ({type(exc).__name__})") from None
