"""Every refusal that Graph is known to give, with its literal code and message.

Clients branch on status and code, so these must be Graph's own; they are gathered here to be compared with
https://learn.microsoft.com/graph/errors and with what its users report.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

BodyForm = Literal["json", "empty", "html"]


class GraphError(Exception):
    """Raised when a call is answered with an error instead of its result."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str = "",
        headers: Mapping[str, str] | None = None,
        form: BodyForm = "json",
    ) -> None:
        super().__init__(f"{status} {code}")
        self.status = status
        self.code = code
        self.message = message
        self.headers = dict(headers or {})
        self.form = form


class ConnectionDropped(Exception):
    """Raised when the connection is to be closed instead of answered; ``hard`` asks for a TCP reset."""

    def __init__(self, *, hard: bool = False) -> None:
        super().__init__("connection dropped")
        self.hard = hard


def bad_request(message: str) -> GraphError:
    return GraphError(400, "BadRequest", message)


def unreadable_body(message: str) -> GraphError:
    return GraphError(400, "RequestBodyRead", message)


def undeserializable_body() -> GraphError:
    return GraphError(400, "UnableToDeserializePostBody", "were unable to deserialize ")


def unknown_member(member: str, type_name: str) -> GraphError:
    return unreadable_body(
        f"The property '{member}' does not exist on type 'microsoft.graph.{type_name}'. Make sure to only use property "
        "names that are defined by the type or mark the type as open type."
    )


def invalid_token(message: str) -> GraphError:
    return GraphError(401, "InvalidAuthenticationToken", message, {"WWW-Authenticate": "Bearer"})


def expired_token() -> GraphError:
    return invalid_token("Lifetime validation failed, the token is expired.")


def no_permissions() -> GraphError:
    return GraphError(
        401,
        "NoPermissionsInAccessToken",
        "The token contains no permissions, or permissions can not be understood.",
    )


def access_denied() -> GraphError:
    return GraphError(403, "ErrorAccessDenied", "Access is denied. Check credentials and try again.")


def blocked_by_policy() -> GraphError:
    return GraphError(
        403,
        "ErrorAccessDenied",
        "Access to OData is disabled: [RAOP] : Blocked by tenant configured AppOnly AccessPolicy settings.",
    )


def send_as_denied() -> GraphError:
    return GraphError(
        403,
        "ErrorSendAsDenied",
        "The user account which was used to submit this request does not have the right to send mail on behalf of the "
        "specified sending account., Cannot submit message.",
    )


def invalid_user(address: str) -> GraphError:
    return GraphError(404, "ErrorInvalidUser", f"The requested user '{address}' is invalid.")


def mailbox_not_enabled() -> GraphError:
    return GraphError(
        404,
        "MailboxNotEnabledForRESTAPI",
        "The mailbox is either inactive, soft-deleted, or is hosted on-premise.",
    )


def item_not_found() -> GraphError:
    return GraphError(404, "ErrorItemNotFound", "The specified object was not found in the store.")


def malformed_id() -> GraphError:
    return GraphError(400, "ErrorInvalidIdMalformed", "Id is malformed.")


def invalid_recipients(detail: str = "") -> GraphError:
    return GraphError(400, "ErrorInvalidRecipients", f"At least one recipient is not valid.{detail}")


def unresolved_recipient(address: str) -> GraphError:
    return invalid_recipients(
        f", Recipient '{address}' is not resolved. All recipients must be resolved before a message can be submitted."
    )


def message_too_large(step: str) -> GraphError:
    return GraphError(400, "ErrorMessageSizeExceeded", f"The message exceeds the maximum supported size., {step}")


def request_too_large(form: Literal["empty", "html", "bad_request"]) -> GraphError:
    if form == "bad_request":
        return bad_request("Maximum request length exceeded.")
    return GraphError(413, "RequestEntityTooLarge", form=form)


def unsupported_filter(name: str) -> GraphError:
    return GraphError(400, "ErrorInvalidProperty", f"The property '{name}' does not support filtering.")


def not_sendable() -> GraphError:
    return GraphError(400, "ErrorInvalidItemForOperationSendItem", "The item is not valid for this operation.")


def throttled(limit: str, retry_after: str) -> GraphError:
    return GraphError(
        429, "ApplicationThrottled", f"Application is over its {limit} limit.", {"Retry-After": retry_after}
    )


def upload_session_not_found() -> GraphError:
    return GraphError(404, "uploadSessionNotFound", "The upload session was not found.")


def invalid_range(code: str, message: str) -> GraphError:
    return GraphError(416, code, message)
