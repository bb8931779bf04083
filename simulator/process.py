"""Runs a simulator as a process of its own that ends with the one that started it."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path

#: How long a start may take, in seconds.
START_TIMEOUT = 20.0

_PACKAGE_PARENT = Path(__file__).resolve().parent.parent


class StartFailed(Exception):
    """Raised when the simulator's process ends, or says nothing, before it serves."""


def start_process(folder: Path, options: dict[str, str | int]) -> subprocess.Popen[str]:
    """Start a simulator with these command line options and return when it serves.

    Raises:
        StartFailed: It does not come up; nothing is left running.
    """
    folder.mkdir(parents=True, exist_ok=True)
    process = _spawn(folder, options)
    try:
        _wait_until_ready(process, folder)
    except StartFailed:
        process.kill()
        process.communicate()
        raise
    return process


def _spawn(folder: Path, options: dict[str, str | int]) -> subprocess.Popen[str]:
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    path = os.pathsep.join(filter(None, (str(_PACKAGE_PARENT), os.environ.get("PYTHONPATH"))))
    with (folder / "simulator.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "simulator", "--dir", str(folder), "--until-stdin-closes", *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )


def _wait_until_ready(process: subprocess.Popen[str], folder: Path) -> None:
    """Wait for the line that the process prints when it serves."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], START_TIMEOUT)
    if not ready or not process.stdout.readline():
        raise StartFailed((folder / "simulator.log").read_text()[-2000:] or "the simulator does not answer")
