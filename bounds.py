"""What a limit on use may be set to, by the settings or by an operator while the fleet runs."""

from __future__ import annotations

from typing import NamedTuple


class Bounds(NamedTuple):
    """The values that a limit on use may have besides 0, which switches it off."""

    least: int
    most: int

    def check(self, limit: int) -> int:
        """Return the limit.

        Raises:
            ValueError: It is out of bounds; says what it must be.
        """
        if limit != 0 and not self.least <= limit <= self.most:
            raise ValueError(f"must be 0 (no limit) or from {self.least} to {self.most}")
        return limit


# Whether it is set here or by an operator while the fleet runs.
CONCURRENCY_BOUNDS = Bounds(1, 1_000)
FLEET_CONCURRENCY_BOUNDS = Bounds(1, 1_000_000)
#: One call charges up to two requests; a limit below what one call charges would have all mail given up.
REQUESTS_BOUNDS = Bounds(2, 1_000_000_000)
#: One request has up to 4 MB (a small attachment in base64, a range of a large one).
UPLOAD_MB_BOUNDS = Bounds(5, 1_000_000)
COUNT_BOUNDS = Bounds(1, 1_000_000_000)
