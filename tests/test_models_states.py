"""Which transitions of an email are allowed, and that nothing makes another."""

from __future__ import annotations

from itertools import product

import pytest
from support import rows

import models
from models.states import FINAL, SETTLED, TRANSITIONS, IllegalTransition, Sending, Status, check

LEGAL = {
    ("received", "dispatched"),
    ("received", "cancelled"),
    ("received", "expired"),
    ("dispatched", "processing"),
    ("dispatched", "received"),
    ("dispatched", "cancelled"),
    ("processing", "processed"),
    ("processing", "failed"),
    ("processing", "received"),
    ("processing", "processing"),
    ("processing", "dispatched"),
    ("processing", "expired"),
    ("failed", "received"),
    ("failed", "processing"),
}


@pytest.mark.parametrize(("source", "target"), sorted(product(Status, Status)))
def test_only_the_transitions_of_the_diagram_are_allowed(source: Status, target: Status) -> None:
    if (source.value, target.value) in LEGAL:
        check(source, target)
    else:
        with pytest.raises(IllegalTransition, match=f"from {source} to {target}"):
            check(source, target)


def test_every_status_has_its_transitions_and_only_final_ones_have_none() -> None:
    assert set(TRANSITIONS) == set(Status)
    assert {"processed", "cancelled", "expired"} == FINAL
    assert {*FINAL, "failed"} == SETTLED


def test_the_database_accepts_the_statuses_of_the_model_and_no_other(database: str) -> None:
    for table, statuses in (("incoming_emails", Status), ("sent_emails", Sending)):
        ((definition,),) = rows(
            "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = %(name)s",
            {"name": f"{table}_status_check"},
        )
        assert set(definition.split("'")[1::2]) == {status.value for status in statuses}
    assert models.Status is Status
