"""What publishers may say: each rule of ``SendEmail``, the events' bodies and ids, and an answer to any input."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import contracts
from contracts import EventType, Unacceptable, accept, event_body, event_id

ROOT = Path(__file__).resolve().parent.parent
SPEC = {
    "publisher_message_id": "string",
    "from": "sender@example.com",
    "to": ["recipient@example.com"],
    "cc": ["cc@example.com"],
    "subject": "Subject text",
    "body": {"contentType": "html", "content": "<p>...</p>"},
    "attachments": [{"name": "file.pdf", "size": 12345, "contentType": "application/pdf", "urlOrId": "..."}],
    "metadata": {"tenant": "..."},
}
MINIMAL = {"from": "ann@example.com", "to": ["bob@example.org"], "body": {"contentType": "text", "content": ""}}
FILE = {"name": "a.pdf", "size": 1, "urlOrId": "https://files.example/a.pdf"}


def email(**changes: Any) -> bytes:
    return orjson.dumps({**MINIMAL, **changes})


def refused(body: bytes) -> Unacceptable:
    with pytest.raises(Unacceptable) as raised:
        accept(body)
    return raised.value


def addresses(count: int) -> list[str]:
    return [f"a{n}@example.org" for n in range(count)]


def test_the_example_of_the_specification_is_accepted() -> None:
    accepted = accept(orjson.dumps(SPEC))
    assert accepted.publisher_message_id == "string"
    assert (accepted.email.mailbox, accepted.email.tenant, accepted.email.recipient_count) == (
        "sender@example.com",
        "...",
        2,
    )


ACCEPTED: dict[str, dict[str, Any]] = {
    "minimal": {},
    "only bcc": {"to": [], "bcc": ["b@example.org"]},
    "500 recipients": {"to": addresses(200), "cc": addresses(200), "bcc": addresses(100)},
    "one reply_to as text": {"reply_to": "r@example.org"},
    "10 reply_to": {"reply_to": addresses(10)},
    "tagged address": {"to": ["first.last+tag@sub.example.co.uk"]},
    "longest subject": {"subject": "ü" * 255},
    "empty subject": {"subject": ""},
    "longest id": {"publisher_message_id": "x" * 255},
    "body with line breaks and tabs": {"body": {"contentType": "text", "content": "a\r\n\tb"}},
    "largest body": {"body": {"contentType": "text", "content": "x" * contracts.MAX_BODY_BYTES}},
    "importance": {"importance": "low"},
    "priority": {"priority": "bulk"},
    "instants": {"send_at": "2030-01-01T00:00:00Z", "expires_at": "2030-01-01T02:00:00+01:00"},
    "odd offset": {"send_at": "2030-01-01T00:00:00+23:00"},
    "5 headers": {"headers": {f"x-a{n}": "v" for n in range(5)}},
    "metadata": {"metadata": {"a": "b", "n": 1, "f": 1.5, "t": True, "none": None}},
    "50 attachments": {"attachments": [FILE] * 50},
    "empty attachment": {"attachments": [FILE | {"size": 0}]},
    "largest attachment": {"attachments": [FILE | {"size": contracts.MAX_ATTACHMENT_BYTES}]},
    "inline attachment": {"attachments": [FILE | {"is_inline": True, "content_id": "logo@mail"}]},
    "type with a parameter": {"attachments": [FILE | {"contentType": "text/plain; charset=utf-8"}]},
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_is_allowed_is_accepted(case: str) -> None:
    accept(email(**ACCEPTED[case]))


CRLF = "a\r\nBcc: eve@example.org"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown field": ({"colour": "red"}, "colour"),
    "no sender": ({"from": None}, "from"),
    "sender without a domain": ({"from": "ann"}, "from"),
    "sender with a name": ({"from": "Ann <ann@example.com>"}, "from"),
    "sender with a line break": ({"from": "ann@example.com\n"}, "from"),
    "address with a header": ({"to": ["b@example.org\r\nBcc: e@example.org"]}, "to.0"),
    "address with a space": ({"cc": ["b c@example.org"]}, "cc.0"),
    "two addresses in one": ({"bcc": ["b@example.org,c@example.org"]}, "bcc.0"),
    "address too long": ({"to": ["a" * 250 + "@example.org"]}, "to.0"),
    "recipients as text": ({"to": "b@example.org"}, "to"),
    "nobody": ({"to": []}, "recipients"),
    "501 recipients": ({"to": addresses(251), "cc": addresses(250)}, "recipients"),
    "501 in one field": ({"to": addresses(501)}, "to"),
    "11 reply_to": ({"reply_to": addresses(11)}, "reply_to"),
    "subject with a header": ({"subject": CRLF}, "subject"),
    "subject with a separator": ({"subject": "a\u2028b"}, "subject"),
    "subject with a NUL": ({"subject": "a\x00b"}, "subject"),
    "subject too long": ({"subject": "x" * 256}, "subject"),
    "subject as a number": ({"subject": 5}, "subject"),
    "empty id": ({"publisher_message_id": ""}, "publisher_message_id"),
    "id too long": ({"publisher_message_id": "x" * 256}, "publisher_message_id"),
    "id with a line break": ({"publisher_message_id": "a\nb"}, "publisher_message_id"),
    "no body": ({"body": None}, "body"),
    "body of another type": ({"body": {"contentType": "markdown", "content": ""}}, "contentType"),
    "body with a NUL": ({"body": {"contentType": "text", "content": "a\x00"}}, "content"),
    "body too large": ({"body": {"contentType": "text", "content": "x" * (contracts.MAX_BODY_BYTES + 1)}}, "content"),
    "body too large in bytes": ({"body": {"contentType": "text", "content": "ü" * 1_600_000}}, "content"),
    "importance": ({"importance": "urgent"}, "importance"),
    "priority": ({"priority": 1}, "priority"),
    "send_at without a zone": ({"send_at": "2030-01-01T00:00:00"}, "send_at"),
    "send_at as a number": ({"send_at": 1_900_000_000}, "send_at"),
    "send_at as a number in a string": ({"send_at": "1900000000"}, "send_at"),
    "send_at as a date": ({"send_at": "2030-01-01"}, "send_at"),
    "expires_at beyond every calendar": ({"expires_at": "9999-12-31T23:59:59-10:00"}, "expires_at"),
    "expires_at before every calendar": ({"expires_at": "0001-01-01T00:00:00+10:00"}, "expires_at"),
    "expiry before the send": (
        {"send_at": "2030-01-01T00:00:00Z", "expires_at": "2030-01-01T00:30:00+01:00"},
        "expires_at",
    ),
    "6 headers": ({"headers": {f"x-a{n}": "v" for n in range(6)}}, "headers"),
    "header of ours": ({"headers": {"Bcc": "eve@example.org"}}, "headers"),
    "header name with a colon": ({"headers": {"x-a: b\r\nBcc": "v"}}, "headers"),
    "header value with a header": ({"headers": {"x-a": CRLF}}, "headers"),
    "header value too long": ({"headers": {"x-a": "v" * 996}}, "headers"),
    "nested metadata": ({"metadata": {"a": {"b": 1}}}, "metadata"),
    "tenant as a number": ({"metadata": {"tenant": 5}}, "tenant"),
    "51 metadata": ({"metadata": {str(n): n for n in range(51)}}, "metadata"),
    "metadata key too long": ({"metadata": {"k" * 65: 1}}, "metadata"),
    "51 attachments": ({"attachments": [FILE] * 51}, "attachments"),
    "attachment without a size": ({"attachments": [{"name": "a", "urlOrId": "x"}]}, "attachments.0.size"),
    "negative size": ({"attachments": [FILE | {"size": -1}]}, "attachments.0.size"),
    "size as text": ({"attachments": [FILE | {"size": "1"}]}, "attachments.0.size"),
    "attachment too large": (
        {"attachments": [FILE | {"size": contracts.MAX_ATTACHMENT_BYTES + 1}]},
        "attachments.0.size",
    ),
    "file name with a line break": ({"attachments": [FILE | {"name": "a\r\nb"}]}, "attachments.0.name"),
    "type with a header": ({"attachments": [FILE | {"contentType": "text/plain\r\nX: y"}]}, "contentType"),
    "content_id in brackets": ({"attachments": [FILE | {"content_id": "<a@b>"}]}, "content_id"),
    "url with a line break": ({"attachments": [FILE | {"urlOrId": "https://a\r\nHost: b"}]}, "urlOrId"),
    "unknown attachment field": ({"attachments": [FILE | {"content": "aGk="}]}, "attachments.0.content"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_allowed_is_refused_and_the_field_is_named(case: str) -> None:
    changes, field = REFUSED[case]
    error = refused(email(**changes))
    assert error.reason == "invalid"
    assert field in error.detail


def test_a_body_larger_than_a_delivery_is_refused_unread() -> None:
    assert refused(b"x" * (contracts.MAX_DELIVERY_BYTES + 1)).reason == "too_large"


@pytest.mark.parametrize("body", [b"", b"\xff", b"{", b'{"a":}', b"[" * 5000, b'"\\ud800"', b"nul", b"{}{}"])
def test_what_is_not_json_is_refused(body: bytes) -> None:
    assert refused(body).reason == "not_json"


def test_every_problem_is_told_at_once() -> None:
    detail = refused(email(subject="a\nb", priority="x", to=["nobody"])).detail
    assert all(field in detail for field in ("subject", "priority", "to.0"))


def test_the_publishers_id_is_told_where_it_can_be_read() -> None:
    assert refused(email(publisher_message_id="order-1", subject=5)).publisher_message_id == "order-1"
    for unreadable in ("", "a\nb", "x" * 256, 5, None, ["a"]):
        assert refused(email(publisher_message_id=unreadable, subject=5)).publisher_message_id is None


# Identity


def identity(body: bytes) -> tuple[str, bytes]:
    accepted = accept(body)
    return accepted.publisher_message_id, accepted.content_hash


def test_without_an_id_the_content_is_the_id() -> None:
    accepted = accept(email())
    assert accepted.publisher_message_id == f"sha256:{hashlib.sha256(accepted.canonical).hexdigest()}"


SAME = {
    "field order": orjson.dumps(dict(reversed(MINIMAL.items()))),
    "order within": orjson.dumps(MINIMAL | {"body": {"content": "", "contentType": "text"}}),
    "white space": json.dumps(MINIMAL, indent=4).encode(),
    "spelled-out defaults": email(
        cc=[], bcc=[], reply_to=[], subject="", importance="normal", priority="normal", headers={}, metadata={}
    ),
    "spelled-out nothing": email(send_at=None, expires_at=None, publisher_message_id=None, attachments=[]),
    "escapes": json.dumps(MINIMAL).replace("ann", "\\u0061nn").encode(),
}


@pytest.mark.parametrize("case", SAME)
def test_the_content_hash_does_not_depend_on_how_the_email_is_written(case: str) -> None:
    assert identity(SAME[case]) == identity(email())


def test_the_content_hash_does_not_depend_on_the_order_of_headers_and_metadata() -> None:
    first = email(headers={"x-a": "1", "x-b": "2"}, metadata={"a": 1, "b": 2})
    second = email(headers={"x-b": "2", "x-a": "1"}, metadata={"b": 2, "a": 1})
    assert identity(first) == identity(second)


def test_the_same_instant_in_another_zone_is_the_same_content() -> None:
    first, second = email(send_at="2030-01-01T12:00:00Z"), email(send_at="2030-01-01T14:00:00+02:00")
    assert identity(first) == identity(second)


def test_the_id_is_no_part_of_the_content() -> None:
    assert identity(email(publisher_message_id="a"))[1] == identity(email(publisher_message_id="b"))[1]


@pytest.mark.parametrize(
    "change",
    [
        {"subject": "x"},
        {"to": ["c@example.org"]},
        {"priority": "high"},
        {"metadata": {"a": 1}},
        {"attachments": [FILE]},
    ],
)
def test_other_content_has_another_hash(change: dict[str, Any]) -> None:
    assert identity(email(**change))[1] != identity(email())[1]


def test_the_content_hash_never_changes_between_versions() -> None:
    assert accept(orjson.dumps(SPEC)).content_hash.hex() == PINNED


PINNED = hashlib.sha256(
    json.dumps(
        {name: value for name, value in SPEC.items() if name != "publisher_message_id"},
        sort_keys=True,
        separators=(",", ":"),
    ).encode()
).hexdigest()


def test_what_is_stored_is_accepted_again_as_the_same() -> None:
    accepted = accept(orjson.dumps(SPEC | {"send_at": "2030-01-01T00:00:00.5+01:00", "headers": {"X-A": "b"}}))
    assert accept(accepted.canonical).content_hash == accepted.content_hash


# Anything at all

PLANTED = "pl4nted"
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
planted = st.text(max_size=8).map(lambda text: PLANTED + text)
fields = st.dictionaries(
    st.sampled_from([*SPEC, "bcc", "reply_to", "importance", "priority", "send_at", "expires_at", "headers"]),
    anything | planted | st.lists(planted, max_size=3) | st.dictionaries(st.just("contentType"), planted),
    max_size=6,
)


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=200) | anything.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_accepted_or_refused_with_a_reason(body: bytes) -> None:
    judged(body)


@settings(max_examples=400, deadline=None)
@given(fields)
def test_any_values_of_the_fields_are_accepted_or_refused_without_being_repeated(values: dict[str, Any]) -> None:
    error = judged(json.dumps(MINIMAL | values).encode())
    if error:
        assert PLANTED not in error.detail
        assert error.publisher_message_id is None or error.publisher_message_id == values["publisher_message_id"]


def judged(body: bytes) -> Unacceptable | None:
    refusal = None
    try:
        accepted = accept(body)
    except Unacceptable as error:
        refusal = error
    else:
        assert accept(accepted.canonical).content_hash == accepted.content_hash
    if refusal:
        assert refusal.reason in {"too_large", "not_json", "invalid"}
        assert refusal.detail.encode()
        assert "\n" not in refusal.detail
    return refusal


# Events

AT = datetime(2026, 2, 13, 13, 34, 56, 789_000, tzinfo=timezone(timedelta(hours=1)))


@pytest.mark.parametrize("type", list(EventType))
def test_an_event_says_which_email_when_and_what(type: EventType) -> None:
    body = event_body(type, publisher_message_id="order-1", incoming_email_id="email-1", at=AT, reason="x")
    assert orjson.loads(body) == {
        "publisher_message_id": "order-1",
        "incoming_email_id": "email-1",
        f"{type.status}_at": "2026-02-13T12:34:56.789Z",
        "status": type.status,
        "reason": "x",
    }
    assert body == event_body(
        type, publisher_message_id="order-1", incoming_email_id="email-1", at=AT.astimezone(UTC), reason="x"
    )


def test_an_events_id_follows_from_its_type_and_its_email_and_never_changes() -> None:
    ids = {event_id(type, key) for type in EventType for key in ("a", "b")}
    assert len(ids) == 2 * len(EventType)
    assert event_id(EventType.RECEIVED, "a") == "e3fd808f-4a39-51a5-b93f-a7637b567a73"


def test_the_events_have_the_names_that_consumers_know() -> None:
    assert {type.value: type.routing_key for type in EventType} == {
        "SendEmailReceived": "email.received",
        "SendEmailSent": "email.sent",
        "SendEmailFailed": "email.failed",
        "SendEmailRejected": "email.rejected",
        "SendEmailExpired": "email.expired",
    }


# Documentation


def test_the_documented_schema_is_the_one_that_is_checked() -> None:
    documented = (ROOT / "docs" / "send-email.schema.json").read_bytes()
    assert documented == contracts.json_schema(), "run: python -m contracts > docs/send-email.schema.json"


def test_the_schema_names_every_field_and_forbids_others() -> None:
    schema = orjson.loads(contracts.json_schema())
    assert schema["properties"].keys() == {
        field.alias or name for name, field in contracts.SendEmail.model_fields.items()
    }
    assert schema["additionalProperties"] is False
    assert set(schema["required"]) == {"from", "body"}
