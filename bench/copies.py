"""Opens the archive and holds each copy against the mail that it should be a copy of.

A row in the archive proves nothing: what was sealed may be cut short, another mail's, or a draft without attachments.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from email import message_from_bytes, policy
from typing import NamedTuple, cast

import psycopg2

from bench.mail import Email, attachments
from sandbox.world import World
from vault import Keyring, Vault, VaultError, bind_to

#: Copies held at a time; each may have some megabytes.
_FETCHED_COPIES = 20
_COPIES = """
    SELECT incoming_email_id::text, graph_message_id, key_id, checksum, size, compressed_blob FROM email_backups
    WHERE incoming_email_id::text = ANY(%(ids)s)
"""


class _Copy(NamedTuple):
    email_id: str
    graph_message_id: str
    key_id: str
    checksum: str
    size_bytes: int
    blob: memoryview


def wrong_copies(world: World, mail: Mapping[str, Email]) -> int:
    """Return how many copies cannot be opened or are not of their mail, which is given by the fleet's id."""
    vault = Vault(Keyring.parse(world.environment["BACKUP_KEYS"]))
    return sum(not _is_true(copy, mail[copy.email_id], vault) for copy in _copies(world, list(mail)))


def _copies(world: World, ids: list[str]) -> Iterator[_Copy]:
    connection = psycopg2.connect(world.environment["DATABASE_URL"])
    try:
        with connection, connection.cursor("copies") as cursor:
            cursor.itersize = _FETCHED_COPIES
            cursor.execute(_COPIES, {"ids": ids})
            yield from (_Copy(*row) for row in cursor)
    finally:
        connection.close()


def _is_true(copy: _Copy, email: Email, vault: Vault) -> bool:
    bound = bind_to(copy.email_id, copy.graph_message_id)
    try:
        chunks = vault.open(copy.blob, key_id=copy.key_id, associated_data=bound, checksum=copy.checksum)
        mime = b"".join(chunks)
    except VaultError:
        return False
    return len(mime) == copy.size_bytes and _is_copy(mime, email)


def _is_copy(mime: bytes, email: Email) -> bool:
    message = message_from_bytes(mime, policy=policy.default)
    contents = [
        (part.get_filename(), hashlib.sha256(cast(bytes, part.get_payload(decode=True))).hexdigest())
        for part in message.iter_attachments()
    ]
    return message["Subject"] == email["subject"] and sorted(contents) == attachments(email)
