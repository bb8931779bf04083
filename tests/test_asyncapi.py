"""The AsyncAPI document: up to date, and true of the events that are published."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
import support
from jsonschema import Draft7Validator, Draft202012Validator
from jsonschema.exceptions import ValidationError
from support import Fleet, rows, store

import actors
import asyncapi
import notices
import operations
from actors.ingest import Delivery
from contracts import EventType

shared_database, tables, fleet = support.shared_database, support.tables, support.fleet
configure = support.configure

ROOT = Path(__file__).parent.parent
LATER = "2999-01-01T00:00:00Z"


def test_the_document_is_up_to_date() -> None:
    documented = orjson.loads((ROOT / "docs/asyncapi.json").read_bytes())
    assert documented == orjson.loads(orjson.dumps(asyncapi.document())), "run: python -m asyncapi > docs/asyncapi.json"


def test_the_document_is_as_asyncapi_wants_it() -> None:
    schema = orjson.loads((ROOT / "tests/fixtures/asyncapi-3.0.0.json").read_bytes())
    validator = Draft7Validator(schema)
    assert [error.message for error in validator.iter_errors(asyncapi.document())] == []
    assert list(validator.iter_errors({**asyncapi.document(), "channels": {"mail": {"address": 5}}}))


def test_every_reference_leads_somewhere() -> None:
    document = asyncapi.document()

    def look(value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                if key == "$ref":
                    place: Any = document
                    for name in inner.removeprefix("#/").split("/"):
                        place = place[name]
                else:
                    look(inner)
        elif isinstance(value, list):
            for inner in value:
                look(inner)

    look(document)


def check(type: str, body: bytes) -> None:
    schema = asyncapi.notice_schema() if type == notices.TYPE else asyncapi.event_schema(EventType(type))
    Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER).validate(orjson.loads(body))


def test_events_that_are_published_are_as_the_document_says(fleet: Fleet, configure: Callable[..., None]) -> None:
    # Given one mail of each end
    configure(max_attempts=1)
    store(publisher_message_id="sent")
    fleet.graph.fail(400, code="ErrorInvalidRecipients", mailbox="ben@example.com")
    store(**{"publisher_message_id": "failed", "from": "ben@example.com"})
    expired = store(publisher_message_id="expired")
    rows("UPDATE incoming_emails SET expires_at = now() WHERE id = %(id)s", {"id": expired})
    operations.cancel(store(publisher_message_id="cancelled", send_at=LATER), who="tests")
    actors.ingest.ingest([Delivery(b'{"no": "mail"}'), Delivery(orjson.dumps(support.send_email()))])
    # When
    fleet.send()
    fleet.schedule()
    actors.notices.notify_dead_letters()
    support.runtime.events.close()
    # Then
    told = {properties.type: body for properties, body in fleet.take_raw("test.events")}
    assert told.keys() == {*EventType, notices.TYPE}
    for type, body in told.items():
        check(type, body)


def test_an_event_that_lacks_a_field_is_not_as_the_document_says() -> None:
    with pytest.raises(ValidationError):
        check("SendEmailSent", b'{"publisher_message_id": "a", "incoming_email_id": "b", "status": "sent"}')
