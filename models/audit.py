"""The audit log: who did what."""

from __future__ import annotations

from typing import Any

import orjson

from models.database import rows
from models.ids import new_id


def record(who: str, action: str, subject: str, **detail: Any) -> None:
    """Write one entry into the transaction that is open, or on its own."""
    rows(
        """
        INSERT INTO audit_log (id, who, action, subject, detail)
        VALUES (%(id)s, %(who)s, %(action)s, %(subject)s, %(detail)s)
        """,
        {"id": new_id(), "who": who, "action": action, "subject": subject, "detail": orjson.dumps(detail).decode()},
    )
