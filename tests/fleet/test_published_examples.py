"""The publishers in docs/examples do what docs/publishing.md says of them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import orjson
import pytest
from fleet_support import a_mailbox, assert_each_left_once, fate

import contracts
from sandbox.world import World

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
#: Where ``bin/setup --checks`` installs amqplib.
PACKAGES = ROOT / ".local" / "node" / "node_modules"
NODE = shutil.which("node")


@pytest.fixture(
    params=[
        "publish.py",
        pytest.param(
            "publish.mjs",
            marks=pytest.mark.skipif(
                not (NODE and (PACKAGES / "amqplib").exists()), reason="Node.js or amqplib is not installed"
            ),
        ),
    ]
)
def example(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A publisher as somebody has copied it into a directory of his own."""
    if request.param.endswith(".mjs"):
        (tmp_path / "node_modules").symlink_to(PACKAGES)
    return Path(shutil.copy(DOCS / "examples" / request.param, tmp_path))


def run(example: Path, world: World, path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [NODE if example.suffix == ".mjs" else sys.executable, str(example), str(path)]
    environment = world.environment | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_a_publisher_hears_what_became_of_its_mail_and_may_repeat_it(
    world: World, example: Path, tmp_path: Path
) -> None:
    # Given the example's mail, from a mailbox of our own
    email = orjson.loads((DOCS / "examples/invoice.json").read_bytes())
    email |= {"from": a_mailbox(), "publisher_message_id": f"invoice-{tmp_path.name}"}
    path = tmp_path / "invoice.json"
    path.write_bytes(orjson.dumps(email))
    # When it is published twice
    first, second = run(example, world, path), run(example, world, path, PATIENCE_SECONDS="2")
    # Then it is sent once
    assert first.returncode == 0, first.stderr
    assert re.findall(r"^SendEmail\w+", first.stdout, re.MULTILINE) == ["SendEmailReceived", "SendEmailSent"]
    known = fate(world, email)
    assert known is not None
    assert_each_left_once(world, [known])
    # And who repeats it is not told again of what it was told
    assert second.returncode == 1
    assert "no word yet" in second.stderr


def test_a_rejected_mail_is_told_with_the_reason(world: World, example: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(b'{"publisher_message_id": "bad", "to": []}')
    ended = run(example, world, path)
    assert ended.returncode == 1
    assert "SendEmailRejected" in ended.stdout
    assert "from" in ended.stdout


def test_a_publisher_is_told_that_there_is_no_queue_for_its_mail(world: World, example: Path, tmp_path: Path) -> None:
    # Given a program with the name of another queue
    example.write_text(example.read_text().replace('"send_email"', '"no_such_queue"'))
    (tmp_path / "mail.json").write_bytes(b"{}")
    # When
    ended = run(example, world, tmp_path / "mail.json")
    # Then it says so at once
    assert ended.returncode == 1
    assert "no queue" in ended.stderr


def test_every_mail_in_the_page_is_accepted() -> None:
    blocks = re.findall(r"```json\n(.*?)```", (DOCS / "publishing.md").read_text(), re.DOTALL)
    emails = [block for block in blocks if '"from"' in block]
    assert emails
    for block in [*emails, (DOCS / "examples/invoice.json").read_text()]:
        contracts.accept(block.encode())
