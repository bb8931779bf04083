"""Counting what there may be millions of: a page of an index at a time, so that no statement runs for long."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.database import rows

#: Entries of an index that one statement passes: a fraction of a second, some seconds where they come from a disk.
PAGE = 50_000
_FIRST = "00000000-0000-0000-0000-000000000000"


def count(table: str, where: str = "true", parameters: Mapping[str, Any] | None = None, *, at_most: int = 0) -> int:
    """Return how many rows of a table there are, in one statement for each `PAGE` of them.

    Args:
        where: A condition with which an index has the rows in the order of their ids.
        at_most: So many are enough to know of; 0: all are counted.
    """
    page = min(PAGE, at_most) if at_most else PAGE
    behind = f"FROM {table} counted WHERE {where} AND id > %(after)s"
    given = {**(parameters or {}), "after": _FIRST}
    counted = 0
    while not at_most or counted < at_most:
        # A bare "id" would be the text, and every row behind be sorted by it.
        last = rows(
            f"SELECT id::text {behind} ORDER BY counted.id OFFSET %(others)s LIMIT 1", {**given, "others": page - 1}
        )
        if not last:
            return counted + int(rows(f"SELECT count(*) {behind}", given)[0][0])
        counted, given["after"] = counted + page, last[0][0]
    return counted
