"""What publishers and mailfleet say to each other: ``SendEmail`` and the events that answer it.

The JSON Schema in ``docs/send-email.schema.json`` is made from these models (``python -m contracts``), so what is
documented is what is checked. Nothing here depends on how mail is stored or sent; every layer may import it.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, Literal, NamedTuple

import orjson
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

__version__ = "0.1.0"

#: Larger deliveries are rejected unread. Content travels by reference (``urlOrId``), so only the body can be large.
MAX_DELIVERY_BYTES = 4_000_000
#: Graph takes 4 MB per request (learn.microsoft.com/graph/api/user-post-messages); the rest of the message needs room.
MAX_BODY_BYTES = 3_000_000
#: Exchange Online's limit over to, cc and bcc (learn.microsoft.com/graph/api/resources/message).
MAX_RECIPIENTS = 500
#: Graph's limit (learn.microsoft.com/graph/api/resources/message, internetMessageHeaders).
MAX_HEADERS = 5
MAX_ATTACHMENTS = 50
#: Graph's limit for one upload session (learn.microsoft.com/graph/outlook-large-attachments).
MAX_ATTACHMENT_BYTES = 150 * 1024 * 1024

#: A rejection names so many problems, in so many characters; then it is long enough to start mending.
_MAX_PROBLEMS = 20
_MAX_DETAIL_CHARACTERS = 2000

#: Names the ids of events and of emails without an id of their own; it must never change.
NAMESPACE = uuid.UUID("5f0e1d7a-3c0b-4a53-9a3e-6d2f7c2b9a10")

_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_ADDRESS = rf"^{_ATOM}(?:\.{_ATOM})*@(?:{_LABEL}\.)+[A-Za-z](?:[A-Za-z0-9-]{{0,61}}[A-Za-z0-9])?$"
_CONTROL = re.compile(r"[\x00-\x1f\x7f\u2028\u2029]")
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


def _one_line(text: str) -> str:
    if _CONTROL.search(text):
        raise ValueError("must not contain control characters or line breaks")
    return text


def _storable(text: str) -> str:
    if _UNPRINTABLE.search(text):
        raise ValueError("must not contain control characters")
    if len(text) > MAX_BODY_BYTES or len(text.encode("utf-8", "surrogatepass")) > MAX_BODY_BYTES:
        raise ValueError(f"must not exceed {MAX_BODY_BYTES} bytes")
    return text


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must be valid Unicode") from None
    return text


def _written_out(value: Any) -> Any:
    if not isinstance(value, str) or not re.match(r"\d{4}-\d\d-\d\d[Tt ]", value):
        raise ValueError("must be an RFC 3339 date and time")
    return value


def _storable_instant(at: datetime) -> datetime:
    """Return the instant in UTC: PostgreSQL takes neither every offset nor every year that RFC 3339 can write."""
    try:
        at = at.astimezone(UTC)
    except OverflowError:
        at = datetime.min.replace(tzinfo=UTC)
    if not 1970 <= at.year < 9999:
        raise ValueError("must be between the years 1970 and 9998")
    return at


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Line = Annotated[str, AfterValidator(_one_line), AfterValidator(_encodable)]
Instant = Annotated[
    AwareDatetime, Field(strict=False), BeforeValidator(_written_out), AfterValidator(_storable_instant)
]
Address = Annotated[str, StringConstraints(max_length=254, pattern=_ADDRESS)]
HeaderName = Annotated[str, StringConstraints(max_length=76, pattern=r"^[xX]-[A-Za-z0-9-]+$")]


class _Contract(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, serialize_by_alias=True, hide_input_in_errors=True
    )


class Body(_Contract):
    """The text of an email."""

    content_type: Literal["html", "text"] = Field(alias="contentType")
    content: Annotated[str, AfterValidator(_encodable), AfterValidator(_storable)] = Field(
        max_length=MAX_BODY_BYTES, description=f"At most {MAX_BODY_BYTES} bytes of UTF-8."
    )


class Attachment(_Contract):
    """A file that is fetched when the mail is sent; it does not travel through RabbitMQ."""

    name: Line = Field(min_length=1, max_length=255)
    size: int = Field(ge=0, le=MAX_ATTACHMENT_BYTES, description="Bytes; the file must have exactly this size.")
    content_type: Line = Field(
        "application/octet-stream",
        alias="contentType",
        max_length=127,
        pattern=r"^[A-Za-z0-9!#$&^_.+-]+/[A-Za-z0-9!#$&^_.+-]+(; ?[A-Za-z0-9!#$&^_.+-]+=[A-Za-z0-9!#$&^_.+\" -]+)*$",
    )
    url_or_id: Line = Field(
        alias="urlOrId",
        min_length=1,
        max_length=2048,
        description="An `https://` address, or the id of an attachment stored with mailfleet.",
    )
    is_inline: bool = False
    content_id: Annotated[str, StringConstraints(max_length=255, pattern=r"^[^\s<>\x00-\x1f]+$")] | None = None


class SendEmail(_Contract):
    """A request to send one email. Unknown fields are rejected."""

    publisher_message_id: Line | None = Field(
        None,
        min_length=1,
        max_length=255,
        description="The publisher's own id: the same id is never sent twice. Missing: a hash of the content.",
    )
    sender: Address = Field(alias="from", description="The mailbox that sends.")
    to: list[Address] = Field([], max_length=MAX_RECIPIENTS)
    cc: list[Address] = Field([], max_length=MAX_RECIPIENTS)
    bcc: list[Address] = Field([], max_length=MAX_RECIPIENTS)
    reply_to: Annotated[list[Address], BeforeValidator(_as_list)] = Field([], max_length=10)
    subject: Line = Field("", max_length=255)
    body: Body
    attachments: list[Attachment] = Field([], max_length=MAX_ATTACHMENTS)
    importance: Literal["low", "normal", "high"] = "normal"
    priority: Literal["high", "normal", "bulk"] = "normal"
    send_at: Instant | None = Field(None, description="RFC 3339; not sent before.")
    expires_at: Instant | None = Field(None, description="RFC 3339; not sent after.")
    headers: dict[HeaderName, Annotated[Line, StringConstraints(max_length=995)]] = Field({}, max_length=MAX_HEADERS)
    metadata: dict[
        Annotated[Line, StringConstraints(min_length=1, max_length=64)],
        Annotated[Line, StringConstraints(max_length=1024)] | int | float | bool | None,
    ] = Field({}, max_length=50, description="Carried along; `tenant` names the publisher's tenant.")

    @model_validator(mode="after")
    def _fits_together(self) -> SendEmail:
        if not 1 <= self.recipient_count <= MAX_RECIPIENTS:
            raise ValueError(f"to, cc and bcc must name 1 to {MAX_RECIPIENTS} recipients together")
        if self.expires_at and self.send_at and self.expires_at <= self.send_at:
            raise ValueError("expires_at must be later than send_at")
        if not isinstance(self.metadata.get("tenant", ""), str):
            raise ValueError("metadata.tenant must be a string")
        return self

    @property
    def recipient_count(self) -> int:
        return len(self.to) + len(self.cc) + len(self.bcc)

    @property
    def mailbox(self) -> str:
        """The sending mailbox, lower-cased: Exchange's addresses do not distinguish case."""
        return self.sender.lower()

    @property
    def tenant(self) -> str | None:
        return self.metadata.get("tenant")  # type: ignore[return-value]  # checked to be a string

    def canonical(self) -> bytes:
        """Return the content as JSON that does not depend on field order, white space or spelled-out defaults."""
        content = self.model_dump(mode="json", by_alias=True, exclude_defaults=True, exclude={"publisher_message_id"})
        return orjson.dumps(content, option=orjson.OPT_SORT_KEYS)


class AcceptedEmail(NamedTuple):
    """A valid ``SendEmail`` with its identity settled: what ingest stores."""

    publisher_message_id: str
    content_hash: bytes
    canonical: bytes
    email: SendEmail


class Unacceptable(Exception):
    """Raised when a delivery is not a valid ``SendEmail``.

    Attributes:
        reason: One word for machines: ``too_large``, ``not_json`` or ``invalid``.
        detail: A sentence per problem, without any of the content.
        publisher_message_id: The publisher's id where it could be read.
    """

    def __init__(self, reason: str, detail: str, publisher_message_id: str | None = None) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.publisher_message_id = publisher_message_id


def accept(body: bytes) -> AcceptedEmail:
    """Read and check one delivery.

    Raises:
        Unacceptable: The body is too large, not JSON or not a valid ``SendEmail``.
    """
    if len(body) > MAX_DELIVERY_BYTES:
        raise Unacceptable("too_large", f"the message has {len(body)} bytes, more than {MAX_DELIVERY_BYTES}")
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Unacceptable("not_json", f"not valid JSON: {error.msg} at line {error.lineno}") from None
    try:
        email = SendEmail.model_validate(content)
    except ValidationError as error:
        raise Unacceptable("invalid", _problems(error), _readable_id(content)) from None
    canonical = email.canonical()
    content_hash = hashlib.sha256(canonical).digest()
    return AcceptedEmail(email.publisher_message_id or f"sha256:{content_hash.hex()}", content_hash, canonical, email)


def _problems(error: ValidationError) -> str:
    problems = [_problem(details) for details in error.errors(include_url=False, include_input=False)[:_MAX_PROBLEMS]]
    return _CONTROL.sub("?", "; ".join(problems))[:_MAX_DETAIL_CHARACTERS].encode("utf-8", "replace").decode()


def _problem(details: Any) -> str:
    place = ".".join(map(str, details["loc"])) or "message"
    # A regular expression is no sentence; the schema has it for those who want it.
    said = "is not of the required form" if details["type"] == "string_pattern_mismatch" else details["msg"]
    return f"{place}: {said.removeprefix('Value error, ')}"


def _readable_id(content: Any) -> str | None:
    candidate = content.get("publisher_message_id") if isinstance(content, dict) else None
    readable = isinstance(candidate, str) and 0 < len(candidate) <= 255 and not _CONTROL.search(candidate)
    return candidate if readable else None


class EventType(StrEnum):
    """The ``type`` of a message on ``mail.events``."""

    RECEIVED = "SendEmailReceived"
    SENT = "SendEmailSent"
    FAILED = "SendEmailFailed"
    REJECTED = "SendEmailRejected"
    EXPIRED = "SendEmailExpired"

    @property
    def routing_key(self) -> str:
        return f"email.{self.status}"

    @property
    def status(self) -> str:
        return self.name.lower()


class Event(NamedTuple):
    """One message on ``mail.events``. Its id stays the same when it is published again: consumers can drop a repeat."""

    id: str
    type: str
    body: bytes
    incoming_email_id: str | None = None
    correlation_id: str | None = None
    reply_to: str | None = None
    traceparent: str | None = None


def event_id(type: EventType, key: str) -> str:
    """Return the ``message_id`` of the event: a pure function of its type and the email's id."""
    return str(uuid.uuid5(NAMESPACE, f"{type}:{key}"))


def event_body(
    type: EventType, *, publisher_message_id: str | None, incoming_email_id: str | None, at: datetime, **details: Any
) -> bytes:
    """Return the event's JSON, e.g. ``{"publisher_message_id", "incoming_email_id", "sent_at", "status": "sent"}``."""
    return orjson.dumps(
        {
            "publisher_message_id": publisher_message_id,
            "incoming_email_id": incoming_email_id,
            f"{type.status}_at": at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "status": type.status,
            **details,
        }
    )


def json_schema() -> bytes:
    """Return the JSON Schema of ``SendEmail``."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **SendEmail.model_json_schema(by_alias=True)}
    return orjson.dumps(schema, option=orjson.OPT_INDENT_2) + b"\n"


if __name__ == "__main__":
    print(json_schema().decode(), end="")
