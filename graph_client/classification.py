"""Turns an answer that is not a success into the error that says what to do, through one table of Graph's codes.

Graph advises to branch on codes (https://learn.microsoft.com/graph/errors), and Exchange reports passing troubles
under statuses that look final, and the other way round: a transient mailbox move is a 500, an abuse verdict may be
a 429. So the code decides where it is known, and the status where it is not. The dictionary of Exchange's codes is
https://learn.microsoft.com/exchange/client-developer/web-service-reference/responsecode.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import orjson

from graph_client import errors
from graph_client.retry_after import retry_after_in

Target = Literal["mailbox", "item", "upload"]


@dataclass(frozen=True, slots=True)
class Operation:
    """A kind of call: what it acts on, and whether doing it twice is harmless."""

    name: str
    target: Target = "item"
    repeatable: bool = True


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer with its body read, up to a bound."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    client_request_id: str

    @property
    def request_id(self) -> str | None:
        return self.headers.get("request-id")

    @property
    def retry_after(self) -> timedelta | None:
        return retry_after_in(self.headers)

    def facts(self) -> dict[str, Any]:
        """Return what an error about this answer carries."""
        return {
            "status": self.status,
            "request_id": self.request_id,
            "client_request_id": self.client_request_id,
            "retry_after": self.retry_after,
        }


#: Exchange counts a day's recipients in a rolling 24 hours, so some are always about to be free again: an hour's
#: wait neither hammers nor oversleeps
#: (https://learn.microsoft.com/office365/servicedescriptions/exchange-online-service-description/exchange-online-limits).
SUBMISSION_QUOTA_WAIT = timedelta(hours=1)

#: What each of Graph's and Exchange's codes means. Codes compare without case.
CODES: dict[str, type[errors.GraphError]] = {
    code.lower(): leaf
    for leaf, codes in {
        errors.InvalidMessage: """
            BadRequest UnableToDeserializePostBody RequestBodyRead InvalidInternetMessageHeader
            InvalidInternetMessageHeaderCollection ErrorMimeContentInvalidBase64String ErrorMimeContentInvalid
            ErrorMimeContentConversionFailed ErrorInvalidProperty ErrorInvalidPropertySet ErrorPropertyUpdate
            ErrorInvalidRequest ErrorSchemaValidation ErrorInvalidArgument""",
        errors.InvalidRecipient: "ErrorInvalidRecipients ErrorInvalidSmtpAddress ErrorMissingRecipients",
        errors.MessageTooLarge: "ErrorMessageSizeExceeded",
        errors.ItemNotFound: """
            ErrorItemNotFound ErrorInvalidIdMalformed ErrorInvalidId ErrorInvalidItemForOperationSendItem
            itemNotFound""",
        errors.AttachmentTooSmall: "ErrorAttachmentSizeShouldNotBeLessThanMinimumSize",
        errors.AttachmentTooLarge: "ErrorAttachmentSizeLimitExceeded",
        errors.ServerUnavailable: """
            ErrorInternalServerError ErrorInternalServerTransientError ErrorMailboxMoveInProgress
            ErrorMailboxStoreUnavailable ErrorMailboxFailover ErrorADUnavailable ErrorInsufficientResources
            ErrorServerBusy ErrorConnectionFailed ErrorTimeoutExpired ErrorNotEnoughMemory MailboxInfoStale
            serviceNotAvailable ServiceUnavailable BadGateway GatewayTimeout InternalServerError""",
        errors.Conflict: "ErrorIrresolvableConflict ErrorStaleObject ErrorItemSave resourceModified Conflict",
        errors.UploadSessionLost: "uploadSessionNotFound uploadSessionFailed",
        errors.UploadOutOfOrder: "invalidRange fragmentOutOfOrder fragmentOverlap",
        errors.MailboxDenied: "ErrorAccessDenied ErrorSendAsDenied accessDenied Authorization_RequestDenied Forbidden",
        errors.MailboxUnknown: "ErrorInvalidUser ErrorNonExistentMailbox Request_ResourceNotFound",
        errors.MailboxUnlicensed: "MailboxNotEnabledForRESTAPI MailboxNotSupportedForRESTAPI",
        errors.MailboxFull: "ErrorQuotaExceeded quotaLimitReached insufficientStorage",
        # Abuse verdicts, by the reports seen for consumer mailboxes mostly; their status is 403, 429 or even 554.
        errors.MailboxBlocked: """
            ErrorExceededMessageLimit ErrorExceededMessageLimitShowTierUpgrade ErrorMessageSubmissionBlocked
            ErrorMessageBlocked ErrorAccountSuspend ErrorAccountSuspendShowTierUpgrade ErrorExceededMaxRecipientLimit
            ErrorExceededMaxRecipientLimitShowTierUpgrade""",
        errors.TokenRefused: "InvalidAuthenticationToken unauthenticated CompactToken AuthenticationError",
        errors.MissingRole: "NoPermissionsInAccessToken",
        errors.Throttled: """
            ApplicationThrottled TooManyRequests activityLimitReached ErrorTooManyObjectsOpened
            CommandConcurrencyLimitReached ErrorExceededConnectionCount ErrorSubmissionQuotaExceeded
            ResourceUnhealthy RateLimitExceeded throttledRequest""",
    }.items()
    for code in codes.split()
}

#: Codes that say no more than the status does.
_SAYS_NOTHING = frozenset({"", "unknownerror", "generalexception", "requestentitytoolarge", "resourcenotfound"})

#: What an answer means when its code is not in the table; a class of statuses stands for those not listed.
_STATUSES: dict[int, type[errors.GraphError]] = {
    401: errors.TokenRefused,
    403: errors.MailboxDenied,
    408: errors.ServerUnavailable,
    409: errors.Conflict,
    410: errors.ItemNotFound,
    412: errors.Conflict,
    416: errors.UploadOutOfOrder,
    423: errors.Conflict,
    425: errors.ServerUnavailable,
    429: errors.Throttled,
    507: errors.MailboxFull,
    509: errors.Throttled,
}
_STATUS_CLASSES: dict[int, type[errors.GraphError]] = {
    3: errors.UnexpectedRedirect,
    4: errors.InvalidMessage,
    5: errors.ServerUnavailable,
}

#: Refusals that are plain whatever the call: the gateway or the store said no before anything was sent.
_PLAIN_5XX = frozenset({507, 509})

#: An abuse check that could not be made hides a passing trouble in a 403.
_TRANSIENT_VERDICT = re.compile(r"WASCL.*TransientError|transient error.*0x00004000", re.IGNORECASE | re.DOTALL)
_REQUEST_TOO_LONG = re.compile(r"maximum request length", re.IGNORECASE)


def classify(
    reply: Reply, operation: Operation, on_unknown_code: Callable[[int, str], None] | None = None
) -> errors.GraphError:
    """Return the error that an unsuccessful answer stands for.

    Args:
        on_unknown_code: Told status and code of an answer whose code the table lacks.
    """
    detail = _detail(reply.body)
    code, known = _best_code(detail)
    message = str(detail.get("message") or "")
    if known is None and code.lower() not in _SAYS_NOTHING and on_unknown_code is not None:
        on_unknown_code(reply.status, code)
    leaf = _leaf(reply, operation, known, message)
    error = leaf(without_addresses(message), code=code or None, **reply.facts())
    _complete(error, reply)
    return error


def _leaf(
    reply: Reply, operation: Operation, known: type[errors.GraphError] | None, message: str
) -> type[errors.GraphError]:
    """Ask in this order: can it have been sent? is it a throttle? what does the code say? and the status?"""
    status = reply.status
    if not operation.repeatable and _proves_nothing(status):
        return errors.AnswerUnclear
    if _throttles(reply, known):
        return errors.Throttled
    if status < 300:
        return errors.ServerUnavailable
    if _TRANSIENT_VERDICT.search(message):
        return errors.ServerUnavailable
    if status == 413 or _REQUEST_TOO_LONG.search(message):
        return errors.AttachmentTooLarge if operation.name == "attach" else errors.MessageTooLarge
    return _in_place(known or _by_status(status, operation), status, operation)


def _proves_nothing(status: int) -> bool:
    return status < 300 or status == 408 or (status >= 500 and status not in _PLAIN_5XX)


def _throttles(reply: Reply, known: type[errors.GraphError] | None) -> bool:
    if known is not None and issubclass(known, errors.MailboxBlocked):
        return False  # waiting out a 429 would never use up the attempts of a mailbox that someone must unblock
    if known is errors.Throttled or reply.status in (429, 509):
        return True
    return reply.status == 503 and reply.retry_after is not None


def _by_status(status: int, operation: Operation) -> type[errors.GraphError]:
    if status == 404:
        return errors.MailboxUnknown if operation.target == "mailbox" else errors.ItemNotFound
    return _STATUSES.get(status) or _STATUS_CLASSES.get(status // 100, errors.ServerUnavailable)


def _in_place(leaf: type[errors.GraphError], status: int, operation: Operation) -> type[errors.GraphError]:
    """Say it in the words of the call: a refusal of an upload URL is no refusal of the mailbox."""
    if operation.target == "upload" and status in (401, 403, 404, 410) and leaf is not errors.MailboxFull:
        # The URL is its own authority: a refusal says that the authority, hence the session, has ended.
        return errors.UploadSessionLost
    return leaf


def _complete(error: errors.GraphError, reply: Reply) -> None:
    if isinstance(error, errors.Throttled):
        error.scope = _scope(reply)
        if error.retry_after is None and (error.code or "").lower() == "errorsubmissionquotaexceeded":
            error.retry_after = SUBMISSION_QUOTA_WAIT
    elif isinstance(error, errors.UploadOutOfOrder):
        error.expected_offset = next_expected_offset(_json(reply.body))


def _scope(reply: Reply) -> errors.ThrottleScope:
    """Outlook's limits are per mailbox; a wider one can be told only where Graph names its scope."""
    named = reply.headers.get("x-ms-throttle-scope", "").lower()
    return "tenant" if named.startswith(("tenant", "application")) else "mailbox"


def next_expected_offset(body: Mapping[str, Any]) -> int | None:
    """Read the next byte that an upload session wants; None when the body does not say.

    Outlook writes a bare number ("2097152"), the specification a range ("2097152-" or "0-4194303").
    """
    named = {name.lower(): value for name, value in body.items()}
    ranges = named.get("nextexpectedranges")
    if not isinstance(ranges, list) or not ranges:
        return None
    start = str(ranges[0]).partition("-")[0].strip()
    return int(start) if start.isascii() and start.isdigit() else None


def _json(body: bytes) -> dict[str, Any]:
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _detail(body: bytes) -> dict[str, Any]:
    detail = _json(body).get("error")
    return detail if isinstance(detail, dict) else {}


def _best_code(detail: dict[str, Any]) -> tuple[str, type[errors.GraphError] | None]:
    """Return the most specific code that the table knows, with its meaning; else the outermost code."""
    codes = list(_codes(detail))
    for code in reversed(codes):
        if leaf := CODES.get(code.lower()):
            return code, leaf
    return (codes[0] if codes else ""), None


#: Of another form it is no code but words, which may quote a mail.
_CODE = re.compile(r"[A-Za-z0-9_.]{1,100}")


def _codes(detail: Any) -> Iterator[str]:
    while isinstance(detail, dict):
        if isinstance(code := detail.get("code"), str) and _CODE.fullmatch(code):
            yield code
        detail = detail.get("innerError") or detail.get("innererror")


_QUOTED = re.compile(r"(?<!\w)'[^']*'(?!\w)|\"[^\"]*\"")
_URL = re.compile(r"\b\w+://\S+")
_ADDRESS = re.compile(r"[^\s<>(),;:]*(?:@|%40)[^\s<>(),;:]*")


def without_addresses(text: str) -> str:
    """Return Graph's words without quotations, URLs and addresses, shortened: it quotes recipients and bodies."""
    for pattern in (_QUOTED, _URL, _ADDRESS):
        text = pattern.sub("…", text)
    return text[:300]
