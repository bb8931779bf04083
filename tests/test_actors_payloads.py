"""From the bridge to Graph with payloads that are sealed in between."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import orjson
import pytest
import support
from support import Fleet, email_row, rows, send_email, sending, table

import models
import runtime
from actors.ingest import Delivery, ingest
from models import turns, workload
from models.payload_keys import find
from payloads import Payloads
from vault import Keyring

shared_database, tables, fleet = support.shared_database, support.tables, support.fleet
configure = support.configure

Configure = Callable[..., None]


def arrive(**changes: Any) -> str:
    """Have the bridge ingest one email, and return its id."""
    email = send_email(**changes)
    ingest([Delivery(orjson.dumps(email))])
    ((id,),) = rows(
        "SELECT id::text FROM incoming_emails WHERE publisher_message_id = %(id)s",
        {"id": email["publisher_message_id"]},
    )
    return str(id)


def test_an_email_is_sealed_in_the_tables_and_reaches_graph_in_clear(fleet: Fleet) -> None:
    id = arrive(subject="The secret subject")
    assert "secret" not in orjson.dumps(support.everything()).decode()
    assert fleet.send() == ["done"]
    (delivery,) = fleet.graph.deliveries(tag=id)
    assert "The secret subject" in orjson.dumps(delivery, default=str).decode()


def test_mail_with_attachments_is_sent_from_a_sealed_payload(fleet: Fleet) -> None:
    file = {
        "name": "a.bin",
        "size": 1000,
        "contentType": "application/octet-stream",
        "urlOrId": fleet.graph.file_url(1000),
    }
    id = arrive(attachments=[file])
    assert "a.bin" not in orjson.dumps(email_row(id)).decode()
    fleet.send()
    assert (sending(id), fleet.mails(id)) == ("sent", 1)


def test_repeats_and_conflicts_are_known_although_the_payload_is_sealed(fleet: Fleet) -> None:
    arrive()
    arrive()
    ingest([Delivery(orjson.dumps(send_email(subject="Another")))])
    assert len(table("incoming_emails")) == 1
    assert fleet.events() == ["SendEmailReceived", "SendEmailRejected"]


def test_what_the_scheduler_and_forecasts_ask_for_is_there(fleet: Fleet) -> None:
    # Given
    id = arrive(
        send_at="2020-01-01T00:00:00Z",
        metadata={"tenant": "acme"},
        attachments=[{"name": "a", "size": 5000, "contentType": "text/plain", "urlOrId": "https://files.example/a"}],
    )
    # Then
    assert email_row(id)["tenant"] == "acme"
    assert timedelta(0) <= turns.waited([id])[id] < timedelta(minutes=1)
    (waiting,) = workload.waiting(small_bytes=3_000_000, attach_json_bytes=300, range_bytes=4_000_000)
    assert (waiting.attached, waiting.attach_requests) == (1, 1)
    assert waiting.upload_bytes > 5000


def test_an_email_that_expired_is_not_sent_although_only_the_sealed_payload_says_so(fleet: Fleet) -> None:
    id = arrive(expires_at="2020-01-01T00:00:00Z")
    fleet.send()
    assert (email_row(id)["status"], fleet.mails(id)) == ("expired", 0)


def test_mail_from_before_and_mail_with_the_setting_off_is_in_clear_and_sent(
    fleet: Fleet, configure: Configure
) -> None:
    before = support.store()
    configure(seal_payloads=False)
    now = arrive(publisher_message_id="order-2")
    assert email_row(before)["payload"]["subject"] == email_row(now)["payload"]["subject"] == "Your order"
    configure(seal_payloads=True)
    assert fleet.send() == ["done", "done"]


def test_a_data_key_that_the_database_has_lost_seals_nothing_that_is_stored(fleet: Fleet) -> None:
    # Given a failover to a server that had not heard of the data key
    arrive()
    rows("DELETE FROM payload_keys")
    # When
    with pytest.raises(models.DatabaseAway):
        arrive(publisher_message_id="order-2")
    assert len(table("incoming_emails")) == 1
    # Then the bridge's next try has a data key that is kept
    id = arrive(publisher_message_id="order-2")
    assert runtime.payloads.open(id, email_row(id)["payload"])["publisher_message_id"] == "order-2"


def lose_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the worker know another ring than the bridge did, and no data key from before."""
    ring = Keyring({"another": bytes(32)})
    monkeypatch.setattr(runtime, "payloads", Payloads(ring, keep=lambda _: None, find=runtime._find_data_key))


def test_mail_whose_key_is_missing_waits_without_spending_an_attempt(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given
    id = arrive()
    with monkeypatch.context() as without:
        lose_the_key(without)
        # When
        assert fleet.send() == ["done"]
    # Then
    row = email_row(id)
    assert (row["status"], row["attempt_count"], sending(id)) == ("received", 0, None)
    assert "no key with the id" in row["last_error"]
    # And it goes out when the key is back
    fleet.settle(id)
    assert (sending(id), fleet.mails(id)) == ("sent", 1)


@pytest.mark.parametrize("via", ["sendmail", "draft"])
def test_a_payload_that_was_moved_to_another_email_is_dead_lettered_and_never_sent(
    fleet: Fleet, configure: Configure, via: str
) -> None:
    # Given
    configure(send_plain_via=via)
    id, other = arrive(), arrive(publisher_message_id="order-2", to=["carl@example.org"])
    rows(
        """
        UPDATE incoming_emails e SET payload = o.payload FROM incoming_emails o
        WHERE (e.id, o.id) IN ((%(id)s, %(other)s), (%(other)s, %(id)s))
        """,
        {"id": id, "other": other},
    )
    # When
    assert fleet.send() == ["dead-lettered"] * 2
    # Then
    assert fleet.graph.requests(mailbox=support.SENDER) == []
    assert {letter["reason"] for letter in table("dlq")} == {"tampered"}


def test_mail_in_doubt_is_settled_with_a_sealed_payload(fleet: Fleet) -> None:
    id = arrive()
    fleet.graph.lose_next_answer()
    fleet.send()
    assert sending(id) == "in_doubt"
    fleet.settle(id)
    assert (sending(id), fleet.mails(id)) == ("sent", 1)


def test_one_data_key_is_kept_for_all_the_mail_of_an_hour(fleet: Fleet) -> None:
    ids = [arrive(publisher_message_id=f"order-{n}") for n in range(3)]
    (key,) = table("payload_keys")
    assert {email_row(id)["payload"]["key"] for id in ids} == {key["id"]}
    assert find(key["id"]) is not None
