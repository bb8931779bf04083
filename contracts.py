"""What publishers and mailfleet say to each other: ``SendEmail`` and the events that answer it.

The JSON Schema in ``docs/send-email.schema.json`` is made from these models (``python -m contracts``), so what is
documented is what is checked. Nothing here depends on how mail is stored or sent; every layer may import it.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Sequence
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
    GetPydanticSchema,
    StringConstraints,
    ValidationError,
    model_validator,
)

from repeated_keys import repeated_key

__version__ = "0.1.0"

#: Larger deliveries are rejected unread. All but small files travel by reference (``urlOrId``).
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
#: What the files in one email (``contentBytes``) may hold together: base64 leaves a third of a delivery for the rest.
MAX_CONTENT_BYTES = 2_000_000
MAX_METADATA = 50
_MAX_METADATA_NAME, _MAX_METADATA_TEXT = 64, 1024
#: Integers that PostgreSQL and every JSON reader with 64-bit integers keep.
_INTEGERS = {"ge": -(2**63), "le": 2**63 - 1}
#: Beyond it not every integer is a double (RFC 7493, 2.2): a longer integer would come out as another number.
_DOUBLES = {"ge": -(2.0**53), "le": 2.0**53}

#: A rejection names so many problems, in so many characters; then it is long enough to start mending.
_MAX_PROBLEMS = 20
_MAX_DETAIL_CHARACTERS = 2000
#: No field of an email holds so many values. Each could be a problem, and a million problems take gigabytes to tell.
_MAX_VALUES = 1000
#: In so few bytes there is no room for so many that it matters.
_FEW_VALUES_BYTES = 16 * _MAX_VALUES

#: Names the ids of events and of emails without an id of their own; it must never change.
NAMESPACE = uuid.UUID("5f0e1d7a-3c0b-4a53-9a3e-6d2f7c2b9a10")

_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_ADDRESS = rf"^{_ATOM}(?:\.{_ATOM})*@(?:{_LABEL}\.)+[A-Za-z](?:[A-Za-z0-9-]{{0,61}}[A-Za-z0-9])?$"
_BREAKING = r"\x00-\x1f\x7f-\x9f\u2028\u2029"
_LINE = rf"^[^{_BREAKING}]*$"
_SOURCE = rf"^(?:(?:[hH][tT][tT][pP][sS]|s3|abfss?|az)://[^\s\\{_BREAKING}]+|[A-Za-z0-9._~-]+)$"
_BASE64 = r"^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$"
_CONTENT_ID = rf"^[^\s<>{_BREAKING}]+$"
_RESTRICTED_NAME = r"[A-Za-z0-9!#$&^_.+-]+"
_CONTENT_TYPE = rf'^{_RESTRICTED_NAME}/{_RESTRICTED_NAME}(; ?{_RESTRICTED_NAME}=[A-Za-z0-9!#$&^_.+" -]+)*$'
_HEADER = r"^[xX]-[A-Za-z0-9-]+$"
#: A regular expression is no sentence; the schema has it for those who want it.
_SENTENCES = {
    _ADDRESS: "must be an address alone, as in ann@example.com",
    _LINE: "must not contain control characters or line breaks",
    _SOURCE: "must be an https URL, the id of a stored attachment, or the URL of an object in a cloud's store",
    _BASE64: "must be base64 of the standard alphabet, padded, without line breaks",
    _HEADER: "must be the name of an x- header",
}
_CONTROL = re.compile(f"[{_BREAKING}\ud800-\udfff]")
#: What a body may not contain, which may have tabs and lines: in UTF-8, where these bytes are nothing else.
_UNPRINTABLE_BYTES = bytes([*range(9), 11, 12, *range(14, 32), 127])
_UNPRINTABLE = r"^[^\x00-\x08\x0b\x0c\x0e-\x1f\x7f]*$"
_FIELD_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")


def _storable(text: str) -> str:
    encoded = text.encode()
    if len(encoded) > MAX_BODY_BYTES:
        raise ValueError(f"must not exceed {MAX_BODY_BYTES} bytes")
    if len(encoded.translate(None, _UNPRINTABLE_BYTES)) < len(encoded):
        raise ValueError("must not contain control characters")
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


def _told_once(source: Any, handler: Any) -> Any:
    """Have a union say one thing of a value that is none of its members, not one for each of them."""
    said = f"must be a line of at most {_MAX_METADATA_TEXT} characters, a number, true, false or null"
    return {**handler(source), "custom_error_type": "metadata", "custom_error_message": said}


Line = Annotated[str, StringConstraints(pattern=_LINE)]
Instant = Annotated[
    AwareDatetime, Field(strict=False), BeforeValidator(_written_out), AfterValidator(_storable_instant)
]
Address = Annotated[str, StringConstraints(max_length=254, pattern=_ADDRESS)]
ReplyTo = Annotated[list[Address], Field(max_length=10)]
HeaderName = Annotated[str, StringConstraints(max_length=76, pattern=_HEADER)]
MetadataName = Annotated[str, StringConstraints(min_length=1, max_length=_MAX_METADATA_NAME, pattern=_LINE)]
_MetadataText = Annotated[str, StringConstraints(max_length=_MAX_METADATA_TEXT, pattern=_LINE)]
MetadataValue = (
    Annotated[
        _MetadataText | Annotated[int, Field(**_INTEGERS)] | Annotated[float, Field(**_DOUBLES)] | bool,
        GetPydanticSchema(_told_once),
    ]
    | None
)
#: In the schema: names of another form are not merely left unchecked.
_NO_OTHERS: dict[str, Any] = {"additionalProperties": False}


class _Contract(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, serialize_by_alias=True, hide_input_in_errors=True
    )


class Body(_Contract):
    """The text of an email."""

    content_type: Literal["html", "text"] = Field(alias="contentType")
    content: Annotated[str, AfterValidator(_storable)] = Field(
        max_length=MAX_BODY_BYTES,
        description=f"At most {MAX_BODY_BYTES} bytes of UTF-8.",
        json_schema_extra={"pattern": _UNPRINTABLE},
    )


#: The default of a field that may be left out and has no null.
_ABSENT: Any = None


def _absent_unless_given(schema: dict[str, Any]) -> None:
    """Leave out of the schema that a field's default is nothing: null is not a value of it."""
    del schema["default"]


class Attachment(_Contract):
    """A file: fetched when the mail is sent, or, if it is small, given as it is. Exactly one of both."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["urlOrId"]}, {"required": ["contentBytes"]}]})

    name: Line = Field(min_length=1, max_length=255)
    size: int = Field(ge=0, le=MAX_ATTACHMENT_BYTES, description="Bytes; the file must have exactly this size.")
    content_type: str = Field("application/octet-stream", alias="contentType", max_length=127, pattern=_CONTENT_TYPE)
    url_or_id: str = Field(
        _ABSENT,
        alias="urlOrId",
        max_length=2048,
        pattern=_SOURCE,
        description="An `https://` address, the id of an attachment stored with mailfleet, or an object in a store of"
        " the cloud (`s3://`, `abfs://`, `abfss://`, `az://`) where mailfleet is set up to read it.",
        json_schema_extra=_absent_unless_given,
    )
    content_bytes: str = Field(
        _ABSENT,
        alias="contentBytes",
        max_length=(MAX_CONTENT_BYTES + 2) // 3 * 4,
        pattern=_BASE64,
        repr=False,
        description=f"The file itself in base64. All of an email together hold at most {MAX_CONTENT_BYTES} bytes.",
        json_schema_extra=_absent_unless_given,
    )
    is_inline: bool = False
    content_id: Annotated[str, StringConstraints(max_length=255, pattern=_CONTENT_ID)] | None = None

    @model_validator(mode="after")
    def _has_one_content(self) -> Attachment:
        given = self.model_fields_set & {"url_or_id", "content_bytes"}
        if len(given) != 1:
            raise ValueError("exactly one of urlOrId and contentBytes must be given")
        if self.content_bytes is not None and self.content_size != self.size:
            raise ValueError("size must be that of the file in contentBytes")
        return self

    @property
    def content_size(self) -> int:
        """How many bytes travel within the email."""
        encoded = self.content_bytes or ""
        return len(encoded) // 4 * 3 - encoded.count("=", -2) if encoded else 0

    @property
    def stored_id(self) -> str | None:
        """The id under which the attachment is stored with us, if that is where it is."""
        return self.url_or_id if self.url_or_id is not None and ":" not in self.url_or_id else None


class SendEmail(_Contract):
    """A request to send one email."""

    model_config = ConfigDict(
        json_schema_extra={
            "description": f"A request to send one email. A delivery has at most {MAX_DELIVERY_BYTES} bytes of JSON in "
            "UTF-8. Unknown fields are rejected, and so is a key that is given twice in one object. "
            f"`to`, `cc` and `bcc` name 1 to {MAX_RECIPIENTS} recipients together."
        }
    )

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
    reply_to: Annotated[ReplyTo, BeforeValidator(_as_list, json_schema_input_type=ReplyTo | Address)] = []
    subject: Line = Field("", max_length=255)
    body: Body
    attachments: list[Attachment] = Field([], max_length=MAX_ATTACHMENTS)
    importance: Literal["low", "normal", "high"] = "normal"
    priority: Literal["high", "normal", "bulk"] = "normal"
    send_at: Instant | None = Field(None, description="RFC 3339; not sent before.")
    expires_at: Instant | None = Field(None, description="RFC 3339; not sent after. Later than `send_at`.")
    headers: dict[HeaderName, Annotated[Line, StringConstraints(max_length=995)]] = Field(
        {},
        max_length=MAX_HEADERS,
        description="Two names do not differ in case alone.",
        json_schema_extra=_NO_OTHERS,
    )
    metadata: dict[MetadataName, MetadataValue] = Field(
        {},
        max_length=MAX_METADATA,
        description="Carried along; `tenant`, a string, names the publisher's tenant. At most "
        f"{MAX_METADATA * (_MAX_METADATA_NAME + _MAX_METADATA_TEXT)} characters in all, names included.",
        json_schema_extra=_NO_OTHERS,
    )

    @model_validator(mode="after")
    def _fits_together(self) -> SendEmail:
        if not 1 <= self.recipient_count <= MAX_RECIPIENTS:
            raise ValueError(f"to, cc and bcc must name 1 to {MAX_RECIPIENTS} recipients together")
        if self.expires_at and self.send_at and self.expires_at <= self.send_at:
            raise ValueError("expires_at must be later than send_at")
        if len({name.lower() for name in self.headers}) < len(self.headers):
            raise ValueError("headers must not name one header twice, in whatever case")
        if sum(attachment.content_size for attachment in self.attachments) > MAX_CONTENT_BYTES:
            raise ValueError(f"the files in contentBytes must not exceed {MAX_CONTENT_BYTES} bytes together")
        if not isinstance(self.metadata.get("tenant", ""), str):
            raise ValueError("metadata.tenant must be a string")
        return self

    @property
    def recipient_count(self) -> int:
        return len(self.to) + len(self.cc) + len(self.bcc)

    @property
    def recipient_domains(self) -> list[str]:
        """The lower-cased domain of each recipient, in no particular order; as many as there are recipients."""
        return [address.rpartition("@")[2].lower() for address in (*self.to, *self.cc, *self.bcc)]

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


#: Every key of ours; another may be content.
_NAMES = {field.alias or name for model in (SendEmail, Body, Attachment) for name, field in model.model_fields.items()}


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

    Takes memory and time in proportion to the body, whatever is in it.

    Raises:
        Unacceptable: The body is too large, not JSON or not a valid ``SendEmail``.
    """
    if len(body) > MAX_DELIVERY_BYTES:
        raise Unacceptable("too_large", f"the message has {len(body)} bytes, more than {MAX_DELIVERY_BYTES}")
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Unacceptable("not_json", f"not valid JSON: {error.msg} at line {error.lineno}") from None
    if len(body) > _FEW_VALUES_BYTES and (place := _bulky(content)):
        raise Unacceptable("invalid", f"{place}: has more than {_MAX_VALUES} values", _readable_id(content))
    try:
        email = SendEmail.model_validate(content)
    except ValidationError as error:
        raise Unacceptable("invalid", _problems(error), _readable_id(content)) from None
    if (repeated := repeated_key(body, _key_count(content))) is not None:
        place = repeated if repeated in _NAMES else "message"
        named = None if repeated == "publisher_message_id" else email.publisher_message_id
        raise Unacceptable("invalid", f"{place}: a key is given more than once", named)
    canonical = email.canonical()
    content_hash = hashlib.sha256(canonical).digest()
    return AcceptedEmail(email.publisher_message_id or f"sha256:{content_hash.hex()}", content_hash, canonical, email)


def _bulky(content: Any) -> str | None:
    """Return the place of more values than any email has there."""
    if not isinstance(content, dict) or len(content) > _MAX_VALUES:
        return "message" if _has_many_values(content) else None
    return next((_place([name]) for name, value in content.items() if _has_many_values(value)), None)


def _has_many_values(value: Any) -> bool:
    waiting, count = [value], 0
    while waiting and count <= _MAX_VALUES:
        each = waiting.pop()
        inner = each.values() if isinstance(each, dict) else each if isinstance(each, list) else ()
        count += len(inner)
        if count <= _MAX_VALUES:
            waiting += [child for child in inner if isinstance(child, dict | list)]
    return count > _MAX_VALUES


def _key_count(content: dict[str, Any]) -> int:
    inner = (content["body"], *content.get("attachments", ()), content.get("headers", ()), content.get("metadata", ()))
    return len(content) + sum(map(len, inner))


def _problems(error: ValidationError) -> str:
    problems = [_problem(details) for details in error.errors(include_url=False, include_input=False)[:_MAX_PROBLEMS]]
    return "; ".join(dict.fromkeys(problems))[:_MAX_DETAIL_CHARACTERS]


def _problem(details: Any) -> str:
    said = details["msg"].removeprefix("Value error, ")
    if details["type"] == "string_pattern_mismatch":
        said = _SENTENCES.get(details["ctx"]["pattern"], "is not of the required form")
    return f"{_place(details['loc'])}: {said}"


def _place(path: Sequence[str | int]) -> str:
    """Name a field. A key that is not ours is named if it looks like a field's name: any other may be content."""
    parts = [part for part in path if part != "[key]"]
    named = [str(part) if isinstance(part, int) or _FIELD_NAME.fullmatch(part) else "?" for part in parts]
    return ".".join(named) or "message"


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
    CANCELLED = "SendEmailCancelled"

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

    @property
    def publisher_message_id(self) -> str | None:
        """The publisher's id of the email, read from the body: not for what every email comes by."""
        told = orjson.loads(self.body).get("publisher_message_id")
        return None if told is None else str(told)


#: The characters of a UUID of version 7 or 8 that are its time (RFC 9562).
_TIME = len("01234567-89ab")


def event_id(type: EventType, email_id: str) -> str:
    """Return the ``message_id`` of an event: a pure function of its type and the email's id.

    It is as old as the email is, so that the outbox's index grows at one end: a UUID of version 8.
    """
    named = str(_named(type, email_id))
    return f"{email_id[:_TIME]}-8{named[_TIME + 2 :]}"


def rejection_id(delivery: str) -> str:
    """Return the ``message_id`` of the event that a delivery is rejected, whatever names it."""
    return str(_named(EventType.REJECTED, delivery))


def _named(type: EventType, name: str) -> uuid.UUID:
    return uuid.uuid5(NAMESPACE, f"{type}:{name}")


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
