"""What publishers may say: each rule of ``SendEmail``, the events' bodies and ids, and an answer to any input."""

from __future__ import annotations

import hashlib
import json
import uuid
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from send_email_bodies import MARK, Body, bodies, emails

import contracts
from contracts import EventType, Unacceptable, accept, event_body, event_id, rejection_id

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
WITH_MAIL = {"name": "a", "size": contracts.MAX_CONTENT_BYTES, "contentBytes": "AAAA" * 666_666 + "AAA="}


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
    "largest numbers": {"metadata": {"a": 2**63 - 1, "b": -(2**63), "c": 2.0**53, "d": -(2.0**53), "e": 5e-324}},
    "a colon behind a quote": {"subject": ': "to": "', "metadata": {': "': '": '}},
    "headers of similar names": {"headers": {"x-a": "1", "x-A-": "2"}},
    "50 attachments": {"attachments": [FILE] * 50},
    "empty attachment": {"attachments": [FILE | {"size": 0}]},
    "largest attachment": {"attachments": [FILE | {"size": contracts.MAX_ATTACHMENT_BYTES}]},
    "a scheme in capitals": {"attachments": [FILE | {"urlOrId": "HTTPS://files.example/?a=%20'b'"}]},
    "a stored attachment": {"attachments": [FILE | {"urlOrId": "0199-ab_c.d~e"}]},
    "an object in a bucket": {"attachments": [FILE | {"urlOrId": "s3://outgoing/reports/a.pdf"}]},
    "an object in a container": {"attachments": [FILE | {"urlOrId": "abfs://c@account.dfs.core.windows.net/a.pdf"}]},
    "a file with the mail": {"attachments": [{"name": "a", "size": 5, "contentBytes": "aGVsbG8="}]},
    "an empty file with the mail": {"attachments": [{"name": "a", "size": 0, "contentBytes": ""}]},
    "as much as may come with the mail": {"attachments": [WITH_MAIL]},
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
    "subject with a next line": ({"subject": "a\x85b"}, "subject"),
    "subject with a NUL": ({"subject": "a\x00b"}, "subject"),
    "subject too long": ({"subject": "x" * 256}, "subject"),
    "subject as a number": ({"subject": 5}, "subject"),
    "empty id": ({"publisher_message_id": ""}, "publisher_message_id"),
    "id too long": ({"publisher_message_id": "x" * 256}, "publisher_message_id"),
    "id with a line break": ({"publisher_message_id": "a\nb"}, "publisher_message_id"),
    "no body": ({"body": None}, "body"),
    "body of another type": ({"body": {"contentType": "markdown", "content": ""}}, "contentType"),
    "body with a NUL": ({"body": {"contentType": "text", "content": "a\x00"}}, "content"),
    "body with a delete": ({"body": {"contentType": "text", "content": "a\x7f"}}, "content"),
    "body with a vertical tab": ({"body": {"contentType": "text", "content": "\x0b"}}, "content"),
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
    "one header twice": ({"headers": {"x-a": "1", "X-A": "2"}}, "headers"),
    "an integer of 65 bits": ({"metadata": {"a": 2**63}}, "metadata.a"),
    "a number that is not exact": ({"metadata": {"a": 2.0**53 + 2}}, "metadata.a"),
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
    "content_id with a delete": ({"attachments": [FILE | {"content_id": "a\x7f"}]}, "content_id"),
    "more than may come with the mail": (
        {"attachments": [WITH_MAIL, {"name": "b", "size": 3, "contentBytes": "AAAA"}]},
        "contentBytes",
    ),
    "a large file with the mail": (
        {"attachments": [{"name": "a", "size": 2_000_004, "contentBytes": "AAAA" * 666_668}]},
        "attachments.0.contentBytes",
    ),
    "a file with another size": (
        {"attachments": [{"name": "a", "size": 4, "contentBytes": "aGVsbG8="}]},
        "size must be that of the file in contentBytes",
    ),
    "a file both ways": ({"attachments": [FILE | {"contentBytes": "AA=="}]}, "exactly one of urlOrId and contentBytes"),
    "a file neither way": ({"attachments": [{"name": "a", "size": 1}]}, "exactly one of urlOrId and contentBytes"),
    "a null for a file": ({"attachments": [{"name": "a", "size": 0, "contentBytes": None}]}, "contentBytes"),
    "base64 without padding": ({"attachments": [{"name": "a", "size": 1, "contentBytes": "AA"}]}, "must be base64"),
    "base64 in lines": ({"attachments": [{"name": "a", "size": 6, "contentBytes": "AAAA\nAAAA"}]}, "must be base64"),
    "base64 for URLs": ({"attachments": [{"name": "a", "size": 3, "contentBytes": "AA-_"}]}, "must be base64"),
    "url without a host": ({"attachments": [FILE | {"urlOrId": "https://"}]}, "urlOrId"),
    "url of another scheme": ({"attachments": [FILE | {"urlOrId": "http://files.example/a"}]}, "urlOrId"),
    "file on our disk": ({"attachments": [FILE | {"urlOrId": "file:///etc/passwd"}]}, "urlOrId"),
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


def test_a_file_name_that_is_too_long_is_refused_with_a_sentence_that_does_not_repeat_it() -> None:
    detail = refused(email(attachments=[FILE | {"name": f"{'x' * 296}.pdf"}])).detail
    assert detail == "attachments.0.name: String should have at most 255 characters"


def test_a_value_of_metadata_is_complained_of_once_and_in_words() -> None:
    detail = refused(email(metadata={"a": [], "b": "x\ny"})).detail
    told = "must be a line of at most 1024 characters, a number, true, false or null"
    assert detail == f"metadata.a: {told}; metadata.b: {told}"


@pytest.mark.parametrize("key", [f"{MARK} is no name", "ключ", "00491234567", "a\nb", "", "k" * 65, "to\u202e"])
@pytest.mark.parametrize("inside", [None, "headers", "metadata", "body"])
def test_a_key_that_may_be_content_is_not_repeated(key: str, inside: str | None) -> None:
    changes = {key: []} if inside is None else {inside: {key: []}}
    detail = refused(email(**changes)).detail
    assert "?: " in detail
    assert not key or key not in detail


def test_more_problems_than_anybody_reads_are_not_told() -> None:
    assert refused(email(to=["nobody"] * 30)).detail.count("must be an address") == 20
    assert len(refused(email(metadata={f"{number:k>64}": [] for number in range(20)})).detail) == 2000


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


# Keys

#: A quote before a colon looks like the end of a key.
ONCE = email(
    publisher_message_id="order-1",
    subject='": ',
    attachments=[FILE],
    headers={"x-a": "1"},
    metadata={"to": "1", "my key": "2"},
).decode()
TWICE = {
    "another recipient": ('"to":', '"to":["eve@evil.example"],"to":', "to"),
    "the same value": ('"from":', '"from":"ann@example.com","from":', "from"),
    "a value of no right type": ('"subject":', '"subject":5,"subject":', "subject"),
    "in another form": ('"to":', '"t\\u006f" :\n["eve@evil.example"],"to":', "to"),
    "in the body": ('"content":', '"content":"other","content":', "content"),
    "in an attachment": ('"size":', '"size":2,"size":', "size"),
    "in headers": ('"x-a":', '"x-a":"2","x-a":', "message"),
    "in metadata": ('"my key":', '"my key":"1","my key":', "message"),
    "a hidden value that is deep": ('"to":', '"to":' + "[" * 1000 + "]" * 1000 + ',"to":', "message"),
    "a hidden value that is long": ('"to":', '"to":' + "9" * 300 + ',"to":', "to"),
}


def test_a_key_of_the_same_name_elsewhere_is_no_repetition() -> None:
    accept(ONCE.encode())


@pytest.mark.parametrize("case", TWICE)
def test_a_key_that_is_given_twice_is_refused_whatever_it_says(case: str) -> None:
    old, new, place = TWICE[case]
    error = refused(ONCE.replace(old, new, 1).encode())
    assert (error.reason, error.detail) == ("invalid", f"{place}: a key is given more than once")
    assert error.publisher_message_id == "order-1"


@pytest.mark.parametrize("space", ["", " ", "\t", "\r", "\n", " \r\n\t"])
def test_white_space_hides_no_repetition(space: str) -> None:
    assert "to" in refused(email().replace(b'"to":', f'"to"{space}:[],"to":'.encode(), 1)).detail


def test_of_two_ids_none_is_told() -> None:
    body = email(publisher_message_id="order-2").replace(b"{", b'{"publisher_message_id":"order-1",', 1)
    assert refused(body).publisher_message_id is None


# Many values

MANY: dict[str, Any] = {str(number): [] for number in range(5000)}
BULKY: dict[str, tuple[bytes, str]] = {
    "a list": (orjson.dumps([0] * 10_000), "message"),
    "lists of lists": (orjson.dumps([[[]] * 90] * 90), "message"),
    "unknown fields": (email(**MANY), "message"),
    "one unknown field": (email(**{"not a name": MANY}), "?"),
    "headers": (email(headers=MANY), "headers"),
    "metadata": (email(metadata=MANY), "metadata"),
    "the body": (email(body=MANY), "body"),
    "recipients": (email(to=["a@example.org"] * 1001), "to"),
    "attachments": (email(attachments=[dict.fromkeys(map(str, range(200)), 0)] * 50), "attachments"),
}


@pytest.mark.parametrize("case", BULKY)
def test_what_has_more_values_than_any_email_is_not_complained_of_value_by_value(case: str) -> None:
    body, place = BULKY[case]
    error = refused(body)
    assert (error.reason, error.detail) == ("invalid", f"{place}: has more than 1000 values")


# Anything at all


@settings(max_examples=300, deadline=None, derandomize=True)
@given(bodies(emails()))
def test_every_body_is_accepted_or_refused_as_it_deserves(drawn: list[Body]) -> None:
    """Each example has an email and what sixteen kinds of damage make of it: more than 5,000 bodies in all."""
    for body in drawn:
        error = judged(body.content)
        assert body.fate != ("sent" if error else "rejected"), body.kind


def judged(body: bytes) -> Unacceptable | None:
    """Say why a body is refused, if it is, after looking at how that is said or at what is stored."""
    refusal = None
    try:
        accepted = accept(body)
    except Unacceptable as error:
        refusal = error
    else:
        again = accept(accepted.canonical)
        assert (again.content_hash, again.canonical) == (accepted.content_hash, accepted.canonical)
    if refusal:
        assert refusal.reason in {"too_large", "not_json", "invalid"}
        assert 10 < len(refusal.detail) <= 2000
        assert refusal.detail.isprintable()
        assert MARK not in refusal.detail
        assert refusal.publisher_message_id is None or 0 < len(refusal.publisher_message_id) <= 255
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
    emails = ("01a21b94-a5cc-72aa-8ecb-98eb2520d5ff", "01a21b94-a5cd-7e01-b9bb-48a2d1c0e1f2")
    ids = {event_id(type, email) for type in EventType for email in emails}
    assert len(ids) == 2 * len(EventType)
    assert event_id(EventType.RECEIVED, emails[0]) == "01a21b94-a5cc-8d33-816c-1dc4b4ac6a95"
    # It sorts by the email's age, and is a UUID of the version for one's own purposes.
    assert all(event_id(type, emails[0]) < event_id(type, emails[1]) for type in EventType)
    assert {(uuid.UUID(id).version, uuid.UUID(id).variant) for id in ids} == {(8, uuid.RFC_4122)}


def test_a_rejections_id_follows_from_the_delivery() -> None:
    assert rejection_id("a") != rejection_id("b")
    assert rejection_id("a") == "b6728483-4666-51e1-aea7-3442ed9e7282"


def test_the_events_have_the_names_that_consumers_know() -> None:
    assert {type.value: type.routing_key for type in EventType} == {
        "SendEmailReceived": "email.received",
        "SendEmailSent": "email.sent",
        "SendEmailFailed": "email.failed",
        "SendEmailRejected": "email.rejected",
        "SendEmailExpired": "email.expired",
        "SendEmailCancelled": "email.cancelled",
    }
