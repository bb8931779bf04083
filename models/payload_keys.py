"""The data keys that payloads are sealed with, as they are kept: wrapped. What wraps them is not known here."""

from __future__ import annotations

from models.database import DatabaseAway, rows


class DataKeyLost(DatabaseAway):
    """Raised when emails are not stored because the database has lost the data key that they were sealed with.

    A failover to a server that had not heard of it yet does that. The next batch has to be sealed with another.
    """


def keep(id: str, key_id: str, wrapped: bytes) -> None:
    """Store a new data key."""
    rows(
        "INSERT INTO payload_keys (id, key_id, wrapped) VALUES (%(id)s, %(key_id)s, %(wrapped)s)",
        {"id": id, "key_id": key_id, "wrapped": wrapped},
    )


def find(id: str) -> tuple[str, str, bytes] | None:
    """Return the id of a data key, the id of what it is wrapped under, and it."""
    found = rows("SELECT id::text, key_id, wrapped FROM payload_keys WHERE id = %(id)s", {"id": id}, prepared=True)
    return (found[0][0], found[0][1], bytes(found[0][2])) if found else None
