"""What the journal keeps of requests, and that it keeps no more than it has room for."""

from __future__ import annotations

from datetime import UTC, datetime

from simulator.journal import REMEMBERED_REQUESTS, Journal, Request


def a_request(client_request_id: str) -> Request:
    return Request(
        at=datetime.now(UTC),
        arrived_monotonic=1.0,
        answered_monotonic=1.1,
        operation="send_mail",
        mailbox="ann@example.com",
        status="202",
        code="",
        request_bytes=100,
        client_request_id=client_request_id,
        retry_after=None,
        wait_seconds=None,
    )


def test_only_the_latest_requests_are_remembered_and_their_numbers_show_what_is_forgotten() -> None:
    journal = Journal()
    for number in range(1, REMEMBERED_REQUESTS + 11):
        journal.note(a_request(str(number)))

    remembered = list(journal.requests_after(5))

    assert len(remembered) == REMEMBERED_REQUESTS
    assert remembered[0][0] == 11
    assert all(request.client_request_id == str(number) for number, request in remembered)
    assert [number for number, _ in journal.requests_after(REMEMBERED_REQUESTS + 8)] == [
        REMEMBERED_REQUESTS + 9,
        REMEMBERED_REQUESTS + 10,
    ]
    assert list(journal.requests_after(REMEMBERED_REQUESTS + 10)) == []
