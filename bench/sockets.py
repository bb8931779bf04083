"""Which connections processes have open, as the kernel lists them; see proc(5), ``/proc/net/tcp``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path


def connections(pids: Iterable[int], names: Mapping[int, str]) -> Counter[str]:
    """Return how many TCP connections the processes hold to each of these ports, by the port's name.

    One that several of them share counts once.
    """
    ports = {
        inode: port
        for table in ("/proc/net/tcp", "/proc/net/tcp6")
        for inode, port in _remote_ports(table)
        if port in names
    }
    held = {inode for pid in pids for inode in _inodes(pid)} & ports.keys()
    return Counter(names[ports[inode]] for inode in held)


def _remote_ports(table: str) -> Iterable[tuple[str, int]]:
    with suppress(OSError):  # there may be no IPv6
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            yield fields[9], int(fields[2].rpartition(":")[2], 16)


def _inodes(pid: int) -> Iterable[str]:
    with suppress(OSError):  # it ended meanwhile
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                target = str(descriptor.readlink())
                if target.startswith("socket:["):
                    yield target[len("socket:[") : -1]
