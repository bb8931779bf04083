"""Sends and finds mail through Microsoft Graph as an application, and says of every failure what to do about it.

Graph's SDK retries sends by itself, which sends twice; this client never does, and tells a request that did not
leave from one whose answer was lost.
"""

from __future__ import annotations

from graph_client.auth import TokenSource, roles_in
from graph_client.calls import MAX_REQUEST_BYTES
from graph_client.client import ATTACH_JSON_BYTES, SMALL_ATTACHMENT_BYTES, GraphClient, attach_bytes
from graph_client.records import Answer, Attachment, Call, Found, Message, UploadSession
from graph_client.retry_after import MAX_RETRY_AFTER, parse_retry_after
from graph_client.transport import looking_first
from graph_client.uploads import MAX_ATTACHMENT_BYTES, UPLOAD_RANGE_BYTES

__all__ = [
    "ATTACH_JSON_BYTES",
    "MAX_ATTACHMENT_BYTES",
    "MAX_REQUEST_BYTES",
    "MAX_RETRY_AFTER",
    "SMALL_ATTACHMENT_BYTES",
    "UPLOAD_RANGE_BYTES",
    "Answer",
    "Attachment",
    "Call",
    "Found",
    "GraphClient",
    "Message",
    "TokenSource",
    "UploadSession",
    "attach_bytes",
    "looking_first",
    "parse_retry_after",
    "roles_in",
]
