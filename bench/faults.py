"""Every way in which Graph may fail without breaking its word, each on a share of the calls, for as long as it lasts.

Left out is what no client could make good: a mail that Graph accepts and then loses, delivers twice or leaves in
Drafts.
"""

from __future__ import annotations

from collections.abc import Callable

from simulator.control import Simulator

Break = Callable[[Simulator, float], None]

#: For longer than a client waits that expects an answer within `bench.chaos.SETTINGS`' time.
HANG_SECONDS = 4.0

_SENDS = ("send_mail", "send_draft")
_CALLS = (*_SENDS, "create_draft", "attach", "create_upload_session", "upload_range", "find", "mime")


def _throttle(graph: Simulator, share: float) -> None:
    """429, asking to wait in every way that has been seen."""
    for retry_after in ("1", "0.5", "0,1"):
        graph.throttle(times=None, probability=share / 3, retry_after=retry_after)


def _refuse(graph: Simulator, share: float) -> None:
    """500 to 504, and nothing was done."""
    for status in (500, 502, 503, 504):
        graph.fail(status, times=None, probability=share / 4)


def _refuse_what_was_done(graph: Simulator, share: float) -> None:
    """500 or 504, and it was done."""
    for status in (500, 504):
        graph.fail(status, executed=True, times=None, probability=share / 2)


def _gateway_timeout_after_a_send(graph: Simulator, share: float) -> None:
    """504 to a send that was done."""
    for operation in _SENDS:
        graph.fail(504, executed=True, times=None, operation=operation, probability=share)


def _lose_answers(graph: Simulator, share: float) -> None:
    for operation in _CALLS:
        graph.lose_next_answer(operation=operation, times=None, probability=share)


def _reset(graph: Simulator, share: float) -> None:
    for operation in _CALLS:
        graph.reset_connection(operation=operation, times=None, probability=share)


def _hang(graph: Simulator, share: float) -> None:
    """No answer within any client's patience: done at once, never, or when nobody waits for it any more."""
    for operation in _CALLS:
        for executed in (True, False, "late"):
            graph.hang(operation=operation, seconds=HANG_SECONDS, executed=executed, times=None, probability=share / 3)


def _expire_tokens(graph: Simulator, share: float) -> None:
    graph.expire_token(times=None, probability=share)


def _accept_with_retry_after(graph: Simulator, share: float) -> None:
    """202 with a Retry-After, which is an acceptance."""
    for operation in _SENDS:
        graph.accept_with_retry_after(retry_after="1", operation=operation, times=None, probability=share)


def _lose_upload_sessions(graph: Simulator, share: float) -> None:
    graph.lose_upload_session(times=None, probability=share)


def _hide_drafts(graph: Simulator, share: float) -> None:
    graph.hide_next_draft(1.0, times=None, probability=share)


def _truncate_mime(graph: Simulator, share: float) -> None:
    graph.break_mime(how="truncated", times=None, probability=share)


#: By the name that the command line knows.
FAULTS: dict[str, Break] = {
    "gateway-timeout-after-send": _gateway_timeout_after_a_send,
    "throttled": _throttle,
    "refused": _refuse,
    "refused-though-done": _refuse_what_was_done,
    "answer-lost": _lose_answers,
    "reset": _reset,
    "hang": _hang,
    "token-expired": _expire_tokens,
    "accepted-with-retry-after": _accept_with_retry_after,
    "upload-session-lost": _lose_upload_sessions,
    "draft-hidden": _hide_drafts,
    "mime-truncated": _truncate_mime,
}


def rates(total: float, given: dict[str, float]) -> dict[str, float]:
    """Return each fault's share of the calls: as given, and the rest of ``total`` in equal parts.

    What strikes only some kinds of calls strikes that share of them, so that all together stay somewhat below.
    """
    others = [name for name in FAULTS if name not in given and name != "gateway-timeout-after-send"]
    return dict.fromkeys(others, total / len(others)) | given if others else given


def break_graph(graph: Simulator, shares: dict[str, float]) -> None:
    """Have Graph fail so, until its faults are cleared."""
    for name, share in shares.items():
        FAULTS[name](graph, share)
