"""Guessing a token: an address that tries too many is refused for a while, and costs no memory to speak of."""

from __future__ import annotations

import pytest
from fastapi import HTTPException, Request
from test_console import GUARDED, SECRET, STRANGER

import telemetry
from console import failed_tries
from console.access import Access, Refusal
from console.failed_tries import FailedTries
from console_tokens import parse_tokens


class Clock:
    seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def access(clock: Clock) -> Access:
    return Access(parse_tokens(GUARDED), FailedTries(3, clock))


def status(access: Access, token: str | None, client: str = STRANGER) -> int:
    headers = [] if token is None else [(b"authorization", f"Bearer {token}".encode())]
    request = Request({"type": "http", "headers": headers, "client": (client, 1)})
    try:
        access.viewer(request)
    except HTTPException as refused:
        return refused.status_code
    return 200


def test_after_too_many_wrong_tokens_an_address_is_refused_for_a_minute_whatever_it_says(
    access: Access, clock: Clock
) -> None:
    assert [status(access, "wrong-token-of-mine") for _ in range(4)] == [401, 401, 401, 429]
    assert status(access, SECRET) == 429
    assert status(access, SECRET, client="198.51.100.1") == 200
    clock.seconds += 60
    assert status(access, SECRET) == 200


def counted(reason: str) -> float:
    value = telemetry.CONSOLE_REFUSALS.labels(reason)._value.get()
    return float(value)


def test_refusals_are_counted_and_wrong_tokens_logged_twice_a_minute_without_a_token(
    access: Access, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    # Given
    before = {reason: counted(reason) for reason in Refusal}
    # When
    for token in ("wrong-token-of-mine",) * 5 + (None,):
        status(access, token)
    status(access, None, client="198.51.100.1")
    # Then
    new = {reason: counted(reason) - before[reason] for reason in Refusal}
    assert {reason: count for reason, count in new.items() if count} == {
        "wrong_token": 3,
        "too_many_tries": 3,
        "no_token": 1,
    }
    assert caplog.messages == [
        f"a wrong token from {STRANGER}",
        f"3 wrong tokens from {STRANGER} in a minute: it is refused for the rest of it",
    ]
    # When the minute is over
    clock.seconds += 60
    status(access, "wrong-token-of-mine")
    assert caplog.messages[2:] == [f"a wrong token from {STRANGER}"]


def test_a_viewer_who_wants_to_act_is_counted_and_logged_by_name(
    access: Access, caplog: pytest.LogCaptureFixture
) -> None:
    before = counted("not_an_operator")
    request = Request(
        {"type": "http", "headers": [(b"authorization", f"Bearer {SECRET}".encode())], "client": (STRANGER, 1)}
    )
    with pytest.raises(HTTPException):
        access.operator(request)
    assert counted("not_an_operator") == before + 1
    assert caplog.messages == ["grafana asked for what only an operator may"]


def test_who_gives_no_token_guesses_nothing(access: Access) -> None:
    assert {status(access, None) for _ in range(10)} == {401}
    assert status(access, SECRET) == 200


def test_the_right_token_costs_no_try(access: Access) -> None:
    assert {status(access, SECRET) for _ in range(10)} == {200}


@pytest.mark.parametrize("other", ["2001:db8::2", "2001:db8:0:0:ffff::1"])
def test_a_network_of_ipv6_is_one_client(access: Access, other: str) -> None:
    for _ in range(3):
        status(access, "wrong-token-of-mine", client="2001:db8::1")
    assert status(access, SECRET, client=other) == 429
    assert status(access, SECRET, client="2001:db8:0:1::1") == 200


def test_an_address_of_ipv4_is_the_same_in_ipv6(access: Access) -> None:
    for _ in range(3):
        status(access, "wrong-token-of-mine", client="::ffff:203.0.113.9")
    assert status(access, SECRET) == 429


def test_so_many_addresses_are_remembered_and_no_more(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failed_tries, "MAX_ADDRESSES", 2)
    tries = FailedTries(1, clock)
    for address in ("192.0.2.1", "192.0.2.2", "192.0.2.3"):
        tries.note(address)
    assert [tries.wait(f"192.0.2.{n}") > 0 for n in (1, 2, 3)] == [False, True, True]


def test_zero_is_no_limit(clock: Clock) -> None:
    tries = FailedTries(0, clock)
    for _ in range(100):
        tries.note(STRANGER)
    assert tries.wait(STRANGER) == 0
