"""Whether an object of a JSON text has a key twice.

orjson keeps the last value where another reader, or the publisher's own log, may see the first: such a mail may go to
others than somebody thinks.
"""

from __future__ import annotations

import json
import re
from typing import Any

#: Every key of a JSON text ends like this, and little else does.
_END_OF_KEY = re.compile(rb'"[ \t\r\n]*:')


class _Repeated(Exception):
    """Raised where a JSON object has a key twice."""

    def __init__(self, key: str) -> None:
        self.key = key


def repeated_key(body: bytes, key_count: int) -> str | None:
    """Return a key that an object of this valid JSON has twice, if there is one.

    Whatever its strings contain, the text ends a key at least as often as it has keys, so it is read a second time only
    if that is more often than what was read has keys: hardly ever.

    Args:
        key_count: How many keys there were in all objects once the text was read.
    """
    if len(_END_OF_KEY.findall(body)) == key_count:
        return None
    try:
        _PAIRS.decode(body.decode())
    except _Repeated as repeated:
        return repeated.key
    except RecursionError:
        return ""  # what is valid is shallow, so this is a value that another one hides
    return None


def _refuse_repeated(pairs: list[tuple[str, Any]]) -> None:
    seen = set()
    for key, _ in pairs:
        if key in seen:
            raise _Repeated(key)
        seen.add(key)


_PAIRS = json.JSONDecoder(object_pairs_hook=_refuse_repeated)
