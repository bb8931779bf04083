"""Whoever changes something through `operations` is written down.

A verb that is added fails here until it writes down who acts, or is listed as one that changes nothing.
"""

from __future__ import annotations

import ast
import inspect

import pytest

import operations

VERBS = {
    name: getattr(operations, name) for name in operations.__all__ if inspect.isfunction(getattr(operations, name))
}
#: What looks and changes nothing.
UNAUDITED = {
    "backlog",
    "backup",
    "concurrency_limits",
    "count_expired",
    "count_to_verify",
    "dead_letter",
    "dead_letter_groups",
    "doctor",
    "find_backups",
    "find_dead_letters",
    "find_emails",
    "forecast",
    "held",
    "limits",
    "limits_set",
    "list_backups",
    "list_holds",
    "older_keys",
    "open_dead_letter",
    "pauses",
    "queues",
    "ready",
    "recipient_firewall",
    "status",
    "timeline",
}
AUDITED = sorted(VERBS.keys() - UNAUDITED)


def writes_down_who(function: ast.FunctionDef, others: dict[str, ast.FunctionDef]) -> bool:
    """Say whether a function hands ``who`` to `audit.record`, or to one of its module's that does."""
    for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
        given = [*call.args, *(keyword.value for keyword in call.keywords)]
        if not any(isinstance(node, ast.Name) and node.id == "who" for node in given):
            continue
        # Of a purge each batch is written down in its own transaction, which `tests/test_retention.py` shows.
        if ast.unparse(call.func) in ("audit.record", "purge_kind"):
            return True
        if isinstance(call.func, ast.Name) and call.func.id in others:
            return writes_down_who(others[call.func.id], others)
    return False


def test_no_verb_is_left_out_that_is_not_there_or_is_told_who_acts() -> None:
    told_who = {name for name, verb in VERBS.items() if "who" in inspect.signature(verb).parameters}
    assert VERBS.keys() >= UNAUDITED
    assert not UNAUDITED & told_who


@pytest.mark.parametrize("name", AUDITED)
def test_a_verb_that_changes_something_is_told_who_acts_and_writes_it_down(name: str) -> None:
    assert "who" in inspect.signature(VERBS[name]).parameters
    tree = ast.parse(inspect.getsource(inspect.getmodule(VERBS[name])))  # type: ignore[arg-type]
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert writes_down_who(functions[VERBS[name].__name__], functions)
