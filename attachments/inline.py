"""Small files that travel within the ``SendEmail``, as ``contentBytes``."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from attachments.contents import Content, PiecewiseContent, Waiting

#: No URL of a publisher begins like this: `contracts` accepts it nowhere.
SCHEME = "base64"


def source_of(attachment: Mapping[str, Any]) -> str:
    """Return what `AttachmentSource.open` takes: an attachment's ``urlOrId``, or the content that came with it."""
    if "contentBytes" in attachment:
        return f"{SCHEME}:{attachment['contentBytes']}"
    return str(attachment["urlOrId"])


class InlineFetcher:
    """Decodes what came with the mail."""

    @contextmanager
    def fetch(self, url: str, offset: int, _version: str | None, _waiting: Waiting) -> Iterator[Content]:
        content = base64.b64decode(url.removeprefix(f"{SCHEME}:"))
        yield PiecewiseContent("contentBytes", [content[offset:]], position=offset, total_bytes=len(content))
