"""Ends a worker's processes with their parent, whatever ended that.

Dramatiq's main process starts the workers and ends them. If it alone is killed, they would work on, with nobody to
start them again or to tell them to end, beside those that the platform then starts.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from typing import Any

import dramatiq

#: From Linux's ``sys/prctl.h``.
_PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int | None = None) -> None:
    """Have the kernel send SIGTERM to this process when its parent has ended. Linux only; elsewhere nothing is done.

    Args:
        parent: Its process id; default: that of the parent that `multiprocessing` knows, if there is one.
    """
    if parent is None and (known := multiprocessing.parent_process()):
        parent = known.pid
    if sys.platform != "linux" or parent is None:
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it has ended already
        os.kill(os.getpid(), signal.SIGTERM)


class EndWithParent(dramatiq.Middleware):
    """Ends each worker process with Dramatiq's main process, as a SIGTERM would: after the messages in hand."""

    def after_process_boot(self, _broker: Any) -> None:
        end_with_parent()
