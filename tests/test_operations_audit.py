"""Whoever changes something through `operations` is written down: no verb can be added that forgets it."""

from __future__ import annotations

import ast
import inspect

import pytest

import operations

VERBS = {
    name: getattr(operations, name) for name in operations.__all__ if inspect.isfunction(getattr(operations, name))
}
AUDITED = sorted(name for name, verb in VERBS.items() if "who" in inspect.signature(verb).parameters)


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


@pytest.mark.parametrize("name", AUDITED)
def test_a_verb_that_is_told_who_acts_writes_it_down(name: str) -> None:
    tree = ast.parse(inspect.getsource(inspect.getmodule(VERBS[name])))  # type: ignore[arg-type]
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert writes_down_who(functions[VERBS[name].__name__], functions)
