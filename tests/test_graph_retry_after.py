"""Retry-After in every form that Graph has been seen to write it, or may."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graph_client import MAX_RETRY_AFTER, parse_retry_after

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("10", 10),
        ("0", 0),
        (" 7 ", 7),
        ("0.249", 0.249),
        ("0,120", 120),
        ("120, 0", 120),
        ("0.5, 3", 3),
        ("5, soon", 5),
        ("Sun, 01 Mar 2026 12:00:30 GMT", 30),
        ("Sunday, 01-Mar-26 12:00:30 GMT", 30),
        ("Sun, 01 Mar 2026 11:00:00 GMT", 0),
    ],
)
def test_each_form_of_retry_after_is_understood(value: str, seconds: float) -> None:
    assert parse_retry_after(value, NOW) == timedelta(seconds=seconds)


@pytest.mark.parametrize("value", [None, "", "soon", "-5", "nan", "inf", "1e3", "1_0", "12 apples", "Sun, 99 Foo 2026"])
def test_a_retry_after_that_makes_no_sense_counts_as_absent(value: str | None) -> None:
    assert parse_retry_after(value, NOW) is None


@pytest.mark.parametrize("value", ["86400", "0,86400", "Fri, 01 Mar 2126 12:00:00 GMT", "999999999999999"])
def test_no_wait_is_longer_than_an_hour(value: str) -> None:
    assert parse_retry_after(value, NOW) == MAX_RETRY_AFTER


@given(st.text(max_size=60))
def test_no_text_whatever_breaks_the_parser(value: str) -> None:
    wait = parse_retry_after(value, NOW)

    assert wait is None or timedelta(0) <= wait <= MAX_RETRY_AFTER
