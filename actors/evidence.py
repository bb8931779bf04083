"""What is kept of each call that decides whether a mail was sent: what was asked, what was seen, under which ids.

Microsoft's support, and a tenant's own Graph activity logs, find a call by Graph's ``request_id`` or by the
``client_request_id`` that we gave it.
"""

from __future__ import annotations

from typing import Any

from graph_client import Answer, Found
from graph_client.errors import GraphError

LOOK_UP = "messages by tag"


def accepted(asked: str, answer: Answer) -> dict[str, Any]:
    """Graph has said 202."""
    return {"asked": asked, "seen": "202", **_ids(answer)}


def refused(asked: str, error: GraphError) -> dict[str, Any]:
    """Graph has said something else, or nothing."""
    return {"asked": asked, "seen": str(error), **_ids(error)}


def looked_up(found: Found, *, sent: int, drafts: int) -> dict[str, Any]:
    """The mailbox was searched for the email's tag."""
    return {"asked": LOOK_UP, "seen": f"{sent} sent, {drafts} drafts", "request_id": ", ".join(found.request_ids)}


def _ids(call: Answer | GraphError) -> dict[str, str | None]:
    return {"request_id": call.request_id, "client_request_id": call.client_request_id}
