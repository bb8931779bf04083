"""Wrong tokens by client address: who guesses is refused for a while."""

from __future__ import annotations

import ipaddress
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

#: Failed tries are remembered of so many addresses.
MAX_ADDRESSES = 10_000
_MINUTE = 60.0


class FailedTries:
    """Counts wrong tokens by client address and minute. Threads may share it; its memory is bounded.

    An address over its limit is refused whatever it says, so the right token is not told from a wrong one either. An
    IPv6 client has 2**64 addresses of its own, so its network is what is counted.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Allow so many wrong tokens a minute; 0: any number."""
        self._per_minute = per_minute
        self._clock = clock
        self._tries: OrderedDict[str, tuple[float, int]] = OrderedDict()
        self._lock = threading.Lock()

    def note(self, address: str) -> int:
        """Count one wrong token; return how many the address has had within the minute.

        The address that has been quiet for longest is forgotten for one too many.
        """
        network, now = _network(address), self._clock()
        with self._lock:
            began_at, count = self._tries.pop(network, (now, 0))
            began_at, count = (now, 1) if now - began_at >= _MINUTE else (began_at, count + 1)
            self._tries[network] = began_at, count
            if len(self._tries) > MAX_ADDRESSES:
                self._tries.popitem(last=False)
        return count

    def wait(self, address: str) -> int:
        """Return for how many seconds the address is refused; 0: it is not."""
        with self._lock:
            began_at, count = self._tries.get(_network(address), (0.0, 0))
        left = began_at + _MINUTE - self._clock()
        return math.ceil(left) if self._per_minute and count >= self._per_minute and left > 0 else 0


def _network(address: str) -> str:
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return ""
    if isinstance(ip, ipaddress.IPv4Address):
        return str(ip)
    return str(ip.ipv4_mapped or ipaddress.ip_network((ip, 64), strict=False))
