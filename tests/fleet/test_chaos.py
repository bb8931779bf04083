"""The proof harness, run for a minute; and that it would find what it looks for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
from fleet_support import a_mailbox, an_attachment, an_email, fates, settled_one

from bench.verdict import judge
from sandbox.world import ROOT, World
from vault import Keyring, Vault, bind_to


def the_harness_run(directory: Path, options: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    figures = directory / "figures.json"
    ended = subprocess.run(
        [sys.executable, "-m", "bench.chaos", *options.split(), "--directory", directory, "--json", figures],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return ended, orjson.loads(figures.read_bytes()) if figures.exists() else {}


def test_while_everything_dies_and_graph_fails_each_mail_leaves_once(tmp_path: Path) -> None:
    # Given every kind of process killed and frozen, servers too, and a tenth of the calls to Graph failing
    options = "--emails 200 --mailboxes 20 --kills 14 --seconds 20 --seed 11 --fault gateway-timeout-after-send=0.1"
    # When
    ended, figures = the_harness_run(tmp_path, options)
    # Then
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert (figures["delivered once"], figures["lost"], figures["duplicated"]) == (200, 0, 0)
    # And it was no easy minute
    assert (figures["kills"], figures["freezes"], figures["freezes beyond the lease"]) == (14, 2, 1)
    assert figures["of them failed"] > 0.05 * figures["Graph calls"]
    assert figures["were in doubt"] > 10


def test_a_fleet_that_waits_too_short_is_found_to_send_twice(tmp_path: Path) -> None:
    # Given a fleet that takes a mail for unsent long before Graph need show it
    too_soon = "--set IN_DOUBT_SETTLE_SECONDS=1 --set IN_DOUBT_GRACE_SECONDS=1"
    options = f"--emails 40 --mailboxes 8 --kills 0 --seconds 2 --fault-rate 0 --fault answer-lost=0.5 {too_soon}"
    # When
    ended, figures = the_harness_run(tmp_path, options)
    # Then
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert figures["duplicated"] > 0
    assert figures["lost"] == 0


def test_a_mail_that_left_twice_and_one_that_never_did_are_found(world: World) -> None:
    # Given a Graph that breaks its word
    doubled, lost, fine = (an_email(a_mailbox(name)) for name in ("doubled", "lost", "fine"))
    world.simulator.deliver_twice(doubled["from"])
    world.simulator.lose_mail(lost["from"])
    # And one that the fleet never got
    unknown = an_email(a_mailbox("unknown"))
    # When
    world.publish(doubled, lost, fine)
    settled_one(world, doubled)
    settled_one(world, fine)
    world.wait_until(
        "all are said to be sent", lambda: fates(world, [lost])[lost["publisher_message_id"]].status == "processed"
    )
    # Then
    verdict = judge(world, [doubled, lost, fine, unknown])
    assert verdict.lost_ids == [lost["publisher_message_id"], unknown["publisher_message_id"]]
    assert verdict.duplicated_ids == [doubled["publisher_message_id"]]
    assert verdict.figures["delivered once"] == 1
    assert verdict.figures["not archived once"] == verdict.figures["not acknowledged"] + 1 == 2
    assert not verdict.holds


def test_a_copy_of_something_else_is_found_in_the_archive(world: World) -> None:
    # Given a mail that is archived as it was sent
    email = an_email(a_mailbox("archived"), attachments=[an_attachment(world.simulator, 1000)])
    world.publish(email)
    id = settled_one(world, email).id
    before = judge(world, [email]).figures
    # When its copy is replaced by one that is sound and has no attachment
    reseal(world, id, f"Subject: {email['subject']}\r\n\r\n{email['body']['content']}".encode())
    # Then
    after = judge(world, [email]).figures
    wrong = ("archive wrong", "attachments wrong", "content wrong", "not archived once")
    assert [before[name] for name in wrong] == [0, 0, 0, 0]
    assert [after[name] for name in wrong] == [1, 0, 0, 0]


def reseal(world: World, id: str, mime: bytes) -> None:
    ((graph_message_id,),) = world.rows(
        "SELECT graph_message_id FROM email_backups WHERE incoming_email_id = %(id)s", {"id": id}
    )
    vault = Vault(Keyring.parse(world.environment["BACKUP_KEYS"]))
    sealed = vault.seal([mime], associated_data=bind_to(id, graph_message_id))
    world.rows(
        """
        UPDATE email_backups SET compressed_blob = %(blob)s, size = %(size)s, checksum = %(checksum)s
        WHERE incoming_email_id = %(id)s
        """,
        {"id": id, "blob": sealed.ciphertext, "size": sealed.size_bytes, "checksum": sealed.checksum},
    )
