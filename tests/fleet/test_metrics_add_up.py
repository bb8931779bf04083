"""After a known load the metrics of all processes add up to it, and after a restart a type counts from nothing."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from datetime import timedelta
from typing import Any

import pytest
import requests
from fleet_support import a_mailbox, an_attachment, an_email, plain_send, settled
from prometheus_client.parser import text_string_to_metric_families
from worlds import Worlds

from sandbox.world import Overdue, World
from simulator.control import Simulator

PLAIN, ATTACHED, AGAIN = 24, 3, 10
#: `MAX_ATTEMPTS` of the world.
ATTEMPTS = 3
SMALL_BYTES, LARGE_BYTES = 1000, 3_500_000


@pytest.fixture(scope="module")
def world(worlds: Worlds) -> World:
    """A fleet that is measured, and whose workers have several processes and threads."""
    return worlds.get({"SEND_PLAIN_PROCESSES": 2, "SEND_PLAIN_THREADS": 3, "SEND_PLAIN_VIA": "sendmail"}, measured=True)


def scraped(world: World, name: str) -> Counter[str]:
    """The samples of one process type, by name and labels; nothing while it does not answer."""
    url = f"http://127.0.0.1:{world.fleet.ports[name].metrics_port}/metrics"
    with requests.Session() as session:
        session.trust_env = False
        try:
            text = session.get(url, timeout=5).text
        except requests.ConnectionError:
            return Counter()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return Counter({_key(sample.name, sample.labels): sample.value for sample in samples if sample.value})


def _key(name: str, labels: dict[str, str]) -> str:
    return " ".join([name.removeprefix("mailfleet_"), *(labels[label] for label in sorted(labels))])


def summed(world: World) -> Counter[str]:
    return sum((scraped(world, name) for name in world.fleet.ports), Counter())


def test_counts_of_all_processes_add_up_after_a_load_and_a_restart(world: World, simulator: Simulator) -> None:
    # Given a load of every kind
    mailboxes = [a_mailbox() for _ in range(4)]
    plain = [an_email(mailboxes[n % 3]) for n in range(PLAIN)]
    attached = [
        an_email(mailboxes[3], attachments=[an_attachment(simulator, size) for size in (SMALL_BYTES, LARGE_BYTES)])
        for _ in range(ATTACHED)
    ]
    simulator.fail(429, mailbox=mailboxes[0], operation=plain_send(world), retry_after="1")
    # And one whose answer is lost, one that is given up, one whose copy is, and one draft that is refused at first
    doubted, given_up, uncopied = troubled = [an_email(a_mailbox()) for _ in range(3)]
    simulator.lose_next_answer(doubted["from"], plain_send(world))
    simulator.fail(400, "ErrorInvalidRecipients", mailbox=given_up["from"], operation=plain_send(world))
    simulator.fail(500, mailbox=uncopied["from"], operation="mime", times=ATTEMPTS)
    simulator.fail(500, mailbox=mailboxes[3], operation="create_draft")
    # And a duplicate, and two that are rejected: a conflict, and what is no email
    published = [*plain, *attached, *troubled, plain[0], plain[0] | {"subject": "Another"}, {"from": "nobody"}]
    world.publish(*published)
    settled(world, [*plain, *attached, *troubled])
    # Then
    received, sent = PLAIN + ATTACHED + 3, PLAIN + ATTACHED + 2
    expected = {
        "deliveries_total stored": received,
        "deliveries_total duplicate": 1,
        "deliveries_total rejected": 2,
        "emails_total received": received,
        "emails_total rejected": 2,
        "emails_total sent": sent,
        "emails_total in doubt": 1,
        "emails_total settled": 1,
        "emails_total retried": 1,
        "emails_total failed": 1,
        "dead_letters_total send_plain invalid_recipient": 1,
        "messages_total send_plain failed": 1,
        "emails_total archived": sent - 1,
        "emails_total backup retried": ATTEMPTS - 1,
        "emails_total backup failed": 1,
        "dead_letters_total backup backup_failed": 1,
        "stage_duration_seconds_count sent": sent,
        "events_published_total SendEmailSent": sent,
        "events_published_total SendEmailFailed": 1,
        "graph_requests_total send_mail 202": PLAIN + 1,
        "graph_requests_total send_mail 400": 1,
        "graph_requests_total send_mail 429": 1,
        "graph_requests_total send_mail none": 1,
        "graph_throttled_total send_mail": 1,
        "graph_requests_total send_draft 202": ATTACHED,
        "uploaded_bytes_total request": ATTACHED * SMALL_BYTES,
        "uploaded_bytes_total range": ATTACHED * LARGE_BYTES,
    }
    adds_up(world, expected)
    told = summed(world)
    assert sum(count for key, count in told.items() if key.startswith("deliveries_total ")) == len(published)
    assert told["dispatched_total no-attachment"] >= PLAIN + 1
    assert told["limiter_admitted_total call"] >= PLAIN + ATTACHED
    assert told["messages_total send_plain done"] >= PLAIN + 1
    assert told["archived_bytes_total"] > ATTACHED * LARGE_BYTES
    assert told["graph_token_expiry_timestamp_seconds"] > 1e9
    assert (told["graph_token_renewals_total done"] > 0, told["graph_token_renewals_total failed"]) == (True, 0)
    # What the clock calls is done, which every worker's processes tell together
    of_scheduler, of_maintenance = scraped(world, "scheduler.1"), scraped(world, "maintenance.1")
    assert 0 <= time.time() - of_scheduler["periodic_turn_timestamp_seconds schedule_emails"] < 90
    assert 0 <= time.time() - of_maintenance["periodic_turn_timestamp_seconds mirror_dead_letters"] < 600
    assert all(scraped(world, name) for name in world.fleet.ports)  # each process type is scraped by itself
    # When one type is ended, another killed, and there is more to do
    world.fleet.stop("send_plain")
    world.fleet.kill("bridge")
    for name in ("send_plain", "bridge"):
        world.fleet.start(name)
    more = [an_email(mailboxes[n % 3]) for n in range(AGAIN)]
    world.publish(*more)
    settled(world, more)
    # Then these begin at nothing, and the others go on
    adds_up(world, {"emails_total sent": AGAIN, "graph_requests_total send_mail 202": AGAIN}, "send_plain.1")
    adds_up(world, {"emails_total received": AGAIN}, "bridge.1")
    adds_up(world, {"emails_total archived": sent - 1 + AGAIN}, "backup.1")


def adds_up(world: World, expected: dict[str, int], *names: str) -> None:
    """Wait until it does: a process counts a moment after it has committed."""

    def wrong() -> dict[str, Any]:
        told: Counter[str] = sum((scraped(world, name) for name in names or world.fleet.ports), Counter())
        return {key: told[key] for key in expected if told[key] != expected[key]}

    with contextlib.suppress(Overdue):
        world.wait_until("the counts add up", lambda: not wrong(), timedelta(seconds=20))
    assert wrong() == {}
