"""What can go wrong between a caller and Graph, sorted by what the caller should do about it.

Families answer "what now?", leaves say what happened. A caller that handles the four families handles everything::

    GraphError
    ├── PermanentError              never repeat this for this mail
    │   ├── InvalidMessage
    │   ├── InvalidRecipient
    │   ├── MessageTooLarge
    │   ├── ItemNotFound
    │   ├── AttachmentTooSmall
    │   └── AttachmentTooLarge
    ├── TransientError              repeat later, an attempt is spent
    │   ├── ConnectionFailed
    │   ├── ConnectionLost
    │   ├── ServerUnavailable
    │   ├── Conflict
    │   ├── UploadSessionLost
    │   ├── UploadOutOfOrder
    │   ├── MailboxUnavailable      nothing from this mailbox works until someone acts
    │   │   ├── MailboxDenied
    │   │   ├── MailboxUnknown
    │   │   ├── MailboxUnlicensed
    │   │   ├── MailboxFull
    │   │   └── MailboxBlocked
    │   └── ConfigurationError      nothing works until someone acts
    │       ├── AuthenticationFailed
    │       ├── TokenRefused
    │       ├── MissingRole
    │       ├── InsecureUrl
    │       └── UnexpectedRedirect
    ├── Throttled                   wait, no attempt is spent
    └── OutcomeUnknown              may or may not have been sent: look before repeating
        ├── AnswerLost
        └── AnswerUnclear

``OutcomeUnknown`` comes only from calls that must not be repeated (``send_mail``, ``send_draft``).
"""

from __future__ import annotations

from datetime import timedelta
from typing import Literal

__all__ = [
    "AnswerLost",
    "AnswerUnclear",
    "AttachmentTooLarge",
    "AttachmentTooSmall",
    "AuthenticationFailed",
    "ConfigurationError",
    "Conflict",
    "ConnectionFailed",
    "ConnectionLost",
    "GraphError",
    "InsecureUrl",
    "InvalidMessage",
    "InvalidRecipient",
    "ItemNotFound",
    "MailboxBlocked",
    "MailboxDenied",
    "MailboxFull",
    "MailboxUnavailable",
    "MailboxUnknown",
    "MailboxUnlicensed",
    "MessageTooLarge",
    "MissingRole",
    "OutcomeUnknown",
    "PermanentError",
    "ServerUnavailable",
    "Throttled",
    "TokenRefused",
    "TransientError",
    "UnexpectedRedirect",
    "UploadOutOfOrder",
    "UploadSessionLost",
]

ThrottleScope = Literal["mailbox", "tenant"]


class GraphError(Exception):
    """A call to Graph that did not succeed.

    ``str()`` of it is fit for a log: it holds the condition, the status, Graph's code and the request ids. Graph's own
    words are in ``message`` alone, with whatever looks like an address, a URL or a quotation taken out.

    Attributes:
        message: A diagnosis for a person; may be empty.
        status: The HTTP status, or None when no answer arrived.
        code: Graph's or the token endpoint's error code, the most specific known one.
        request_id: Graph's id of the request, which Microsoft's support asks for.
        client_request_id: Our id of the request, sent as ``client-request-id``.
        retry_after: How long Graph asked to wait, or None when it did not say.
    """

    def __init__(
        self,
        message: str = "",
        *,
        status: int | None = None,
        code: str | None = None,
        request_id: str | None = None,
        client_request_id: str | None = None,
        retry_after: timedelta | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.request_id = request_id
        self.client_request_id = client_request_id
        self.retry_after = retry_after

    def __str__(self) -> str:
        facts = {
            "status": self.status,
            "code": self.code,
            "request-id": self.request_id,
            "client-request-id": self.client_request_id,
        }
        said = ", ".join(f"{name} {value}" for name, value in facts.items() if value)
        return f"{type(self).__name__} ({said})" if said else type(self).__name__


class PermanentError(GraphError):
    """Raised when repeating the call for this mail cannot help."""


class InvalidMessage(PermanentError):
    """Raised when Graph, or the JSON encoder, rejects the message as it is."""


class InvalidRecipient(PermanentError):
    """Raised when a recipient's address is rejected, or when there is none."""


class MessageTooLarge(PermanentError):
    """Raised when the request exceeds what Graph takes at once, or the message what the mailbox may send."""


class ItemNotFound(PermanentError):
    """Raised when the id names nothing that the call can act on: never existed, deleted, or sent and moved."""


class AttachmentTooSmall(PermanentError):
    """Raised when an attachment is too small for an upload session: ``attach`` it instead."""


class AttachmentTooLarge(PermanentError):
    """Raised by ``attach`` when an upload session is needed, and by ``create_upload_session`` when nothing will do."""


class TransientError(GraphError):
    """Raised when the same call may succeed later; an attempt is spent."""


class ConnectionFailed(TransientError):
    """Raised when the request never left: name resolution, connect, TLS handshake or proxy failed."""


class ConnectionLost(TransientError):
    """Raised when a request that may be repeated left, and its answer did not arrive whole."""


class ServerUnavailable(TransientError):
    """Raised when Graph or the token endpoint failed on its side, on a call that may be repeated."""


class Conflict(TransientError):
    """Raised when the item changed under the call: read it again."""


class UploadSessionLost(TransientError):
    """Raised when an upload session has expired or is unknown: create another, from the file's first byte."""


class UploadOutOfOrder(TransientError):
    """Raised when the range is not the one that Graph expects next.

    Attributes:
        expected_offset: Where Graph wants to go on, or None when it did not say.
    """

    expected_offset: int | None = None


class MailboxUnavailable(TransientError):
    """Raised when nothing from this mailbox works until someone acts."""


class MailboxDenied(MailboxUnavailable):
    """Raised when the application may not act for the mailbox (access policy, role, send-as)."""


class MailboxUnknown(MailboxUnavailable):
    """Raised when no such mailbox exists, or none yet."""


class MailboxUnlicensed(MailboxUnavailable):
    """Raised when the mailbox is inactive, on-premises or without a licence."""


class MailboxFull(MailboxUnavailable):
    """Raised when the mailbox's storage is used up, so that not even a draft can be stored."""


class MailboxBlocked(MailboxUnavailable):
    """Raised when Microsoft's abuse protection has blocked the mailbox from sending."""


class ConfigurationError(TransientError):
    """Raised when nothing works until someone corrects the application's set-up."""


class AuthenticationFailed(ConfigurationError):
    """Raised when the token endpoint refuses the application, or its credential cannot be used.

    msal keeps a refusal for 60 seconds, so a repaired secret may look broken for another minute.

    Attributes:
        aadsts: The number of the AADSTS error (https://login.microsoftonline.com/error?code=…), or None.
    """

    aadsts: int | None = None

    def __str__(self) -> str:
        return super().__str__() + (f" AADSTS{self.aadsts}" if self.aadsts else "")


class TokenRefused(ConfigurationError):
    """Raised when Graph answers 401 to a fresh token too."""


class MissingRole(ConfigurationError):
    """Raised when the token carries no permission at all."""


class InsecureUrl(ConfigurationError):
    """Raised when a URL is not https and not on the loopback, or would take a token to another host."""


class UnexpectedRedirect(ConfigurationError):
    """Raised on a redirect: Graph sends none for mail, so something else answered. It is never followed."""


class Throttled(GraphError):
    """Raised when a rate limit refused the call; nothing was done and no attempt is spent.

    Attributes:
        retry_after: How long to leave the scope alone; None when Graph did not say, which calls for back-off.
        scope: Who has to wait: everybody who talks to this ``mailbox``, or the whole ``tenant``.
    """

    scope: ThrottleScope = "mailbox"


class OutcomeUnknown(GraphError):
    """Raised when a mail may or may not have been sent: look for it before sending again."""


class AnswerLost(OutcomeUnknown):
    """Raised when a send left and no answer came (timeout, reset, connection closed)."""


class AnswerUnclear(OutcomeUnknown):
    """Raised when the answer to a send proves nothing (408, 5xx, or a success other than 202)."""
