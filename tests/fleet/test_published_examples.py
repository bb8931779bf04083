"""The publishers in docs/examples do what docs/publishing.md says of them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import orjson
from fleet_support import a_mailbox, assert_each_left_once, fate

import contracts
from sandbox.world import World

DOCS = Path(__file__).parent.parent.parent / "docs"


def run(world: World, path: Path, patience_seconds: int = 60) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DOCS / "examples/publish.py"), str(path)]
    environment = world.environment | {"PATIENCE_SECONDS": str(patience_seconds)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_a_publisher_hears_what_became_of_its_mail_and_may_repeat_it(world: World, tmp_path: Path) -> None:
    # Given the example's mail, from a mailbox of our own
    email = orjson.loads((DOCS / "examples/invoice.json").read_bytes())
    email |= {"from": a_mailbox(), "publisher_message_id": f"invoice-{tmp_path.name}"}
    path = tmp_path / "invoice.json"
    path.write_bytes(orjson.dumps(email))
    # When it is published twice
    first, second = run(world, path), run(world, path, patience_seconds=2)
    # Then it is sent once
    assert first.returncode == 0, first.stderr
    assert re.findall(r"^SendEmail\w+", first.stdout, re.MULTILINE) == ["SendEmailReceived", "SendEmailSent"]
    known = fate(world, email)
    assert known is not None
    assert_each_left_once(world, [known])
    # And who repeats it is not told again of what it was told
    assert second.returncode == 1
    assert "no word yet" in second.stderr


def test_a_rejected_mail_is_told_with_the_reason(world: World, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(b'{"publisher_message_id": "bad", "to": []}')
    ended = run(world, path)
    assert ended.returncode == 1
    assert "SendEmailRejected" in ended.stdout
    assert "from" in ended.stdout


def test_every_mail_in_the_page_is_accepted() -> None:
    blocks = re.findall(r"```json\n(.*?)```", (DOCS / "publishing.md").read_text(), re.DOTALL)
    emails = [block for block in blocks if '"from"' in block]
    assert emails
    for block in [*emails, (DOCS / "examples/invoice.json").read_text()]:
        contracts.accept(block.encode())
