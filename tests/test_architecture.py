"""How the parts may know each other, and how long anything may get: rules that a review would otherwise have to see."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import dramatiq
import pytest

import actors
import runtime
from crash_points import CrashPoint

ROOT = Path(__file__).resolve().parent.parent
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60

LEAVES = {
    "addresses",
    "attachments",
    "bounds",
    "broker",
    "console_tokens",
    "contracts",
    "crash_points",
    "forecast",
    "graph_client",
    "limiter",
    "mail_rules",
    "notices",
    "orphans",
    "payloads",
    "redaction",
    "repeated_keys",
    "secret_stores",
    "settings",
    "settings_reference",
    "settings_sources",
    "telemetry",
    "tracing",
    "vault",
}
#: Whom each part may import. Every part must be here.
MAY_IMPORT: dict[str, set[str]] = {
    **{leaf: set() for leaf in LEAVES},
    "broker": {"crash_points"},
    "payloads": {"vault"},
    "telemetry": {"redaction"},
    "contracts": {"repeated_keys"},
    "settings": {"addresses", "bounds", "mail_rules", "settings_reference", "settings_sources"},
    "settings_reference": {"settings", "settings_sources"},
    "settings_sources": {"secret_stores"},
    "waking": {"crash_points"},
    "models": {"contracts"},
    "outbox": {"contracts"},
    "worker_metrics": {"orphans", "telemetry"},
    "asyncapi": {"contracts", "notices"},
    "migrations": {"settings"},
    "runtime": {*LEAVES, "models", "outbox", "waking", "worker_metrics"},
    "actors": {*LEAVES, "models", "outbox", "runtime"},
    "operations": {*LEAVES, "models", "outbox", "runtime", "actors"},
    **{
        entrance: {*LEAVES, "models", "outbox", "runtime", "actors", "operations"}
        for entrance in ("bridge", "cli", "clock", "console")
    },
    "simulator": set(),
    "sandbox": {"simulator", "settings"},
    "bench": {*LEAVES, "models", "outbox", "runtime", "actors", "migrations", "sandbox", "simulator"},
}
PRODUCT = {part for part in MAY_IMPORT if part not in {"simulator", "sandbox", "bench"}}
PROCESS_TYPES = {
    "release",
    "bridge",
    "clock",
    "scheduler",
    "send_plain",
    "send_attached",
    "backup",
    "maintenance",
    "console",
}
#: Started only where Python producers send to it.
OPTIONAL_QUEUES = {"ingest"}


def parts() -> set[str]:
    return {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}


def modules(part: str) -> Iterator[Path]:
    yield from [ROOT / f"{part}.py"] if (ROOT / f"{part}.py").exists() else sorted((ROOT / part).rglob("*.py"))


@cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def imported(path: Path) -> set[str]:
    found: set[str] = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


def test_every_part_has_its_place() -> None:
    assert parts() == set(MAY_IMPORT)


@pytest.mark.parametrize("part", sorted(MAY_IMPORT))
def test_a_part_imports_only_what_lies_below_it(part: str) -> None:
    for path in modules(part):
        known = imported(path) & parts() - {part}
        assert known <= MAY_IMPORT[part], f"{path.relative_to(ROOT)} imports {sorted(known - MAY_IMPORT[part])}"


def test_nothing_of_ours_is_imported_by_the_simulator_and_nothing_of_it_by_the_product() -> None:
    for part in PRODUCT:
        assert not {"simulator", "sandbox", "bench", "tests"} & set().union(*map(imported, modules(part)))


def test_only_the_settings_read_the_environment() -> None:
    readers = {part for part in PRODUCT for path in modules(part) if any(map(reads_environment, nodes(path)))}
    assert readers == {"settings", "settings_sources"}


def reads_environment(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return node.value.id == "os" and node.attr in {"environ", "environb", "getenv"}
    return isinstance(node, ast.ImportFrom) and node.module == "os" and node.names[0].name in {"environ", "getenv"}


def test_the_models_know_no_network_but_postgresql() -> None:
    foreign = {"requests", "redis", "pika", "dramatiq", "msal", "urllib3", "socket"}
    assert not foreign & set().union(*map(imported, modules("models")))


# Lines at which a process may die

DOCUMENTED = re.compile(r"``?([a-z-]+\.[a-z-]+)``?")


@cache
def documented(path: Path) -> set[str]:
    documented_by = (ast.Module, ast.ClassDef, ast.FunctionDef)
    texts = [ast.get_docstring(node) or "" for node in nodes(path) if isinstance(node, documented_by)]
    return {name for text in texts for name in DOCUMENTED.findall(text)}


@pytest.mark.parametrize("point", CrashPoint)
def test_what_happens_after_a_death_is_told_in_the_code_that_may_die_and_in_the_docs(point: CrashPoint) -> None:
    sources = [path for part in PRODUCT - {"crash_points"} for path in modules(part)]
    assert any(re.search(rf"\(CrashPoint\.{point.name}\b", path.read_text()) for path in sources)
    assert any(point in documented(path) for path in sources)
    assert point in DOCUMENTED.findall((ROOT / "docs" / "flow.md").read_text())


# Processes and queues


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("SEND_PLAIN_THREADS", "0"),
        ("SEND_PLAIN_THREADS", "-1"),
        ("SEND_PLAIN_THREADS", "eight"),
        ("SEND_PLAIN_PROCESSES", "0"),
        ("DRAMATIQ_THREADS", "08"),
        ("DRAMATIQ_PROCESSES", "10000"),
    ],
)
def test_a_worker_with_no_thread_or_process_does_not_start(variable: str, value: str) -> None:
    # It would take messages and do nothing with them
    start = ["/bin/sh", ROOT / "bin" / "start", "send_plain"]
    environment = {"PATH": os.environ["PATH"], "PYTHONHOME": "/nowhere", variable: value}
    ended = subprocess.run(start, env=environment, capture_output=True, text=True, check=False, timeout=20)
    assert ended.returncode == 2
    assert variable in ended.stderr
    assert "must be a whole number from 1 to 9999" in ended.stderr


def test_the_procfile_names_the_process_types_and_bin_start_knows_each() -> None:
    lines = dict(line.split(": ", 1) for line in (ROOT / "Procfile").read_text().splitlines() if line)
    assert set(lines) == PROCESS_TYPES
    assert all(command == f"bin/start {name}" for name, command in lines.items())
    known = set(re.findall(r"[a-z_]+", " ".join(re.findall(r"^    ([a-z_ |]+)\)", start_script(), re.MULTILINE))))
    assert known == PROCESS_TYPES | OPTIONAL_QUEUES


def start_script() -> str:
    return (ROOT / "bin" / "start").read_text()


def test_every_queue_that_an_actor_has_is_worked_on_and_no_other() -> None:
    lines = re.findall(r"^    ([a-z_ |]+)\) worker \"\$type\"", start_script(), re.MULTILINE)
    workers = {name for line in lines for name in line.split(" | ")}
    declared = {actor.queue_name for actor in vars(actors).values() if isinstance(actor, dramatiq.Actor)}
    assert workers == declared == set(runtime.fleet_broker.queues)
    assert workers - PROCESS_TYPES == OPTIONAL_QUEUES


def test_every_actor_can_be_found_by_importing_the_package() -> None:
    assert {getattr(actors, name).actor_name for name in actors.__all__} == runtime.fleet_broker.actors.keys()


# Names and sizes


def test_no_module_shadows_the_standard_library() -> None:
    assert not parts() & set(sys.stdlib_module_names)


def test_no_module_is_named_for_having_no_subject() -> None:
    vague = re.compile(r"utils?|helpers?|common|services?|managers?|misc|base|core|handlers?")
    named = {path.stem for part in parts() for path in modules(part)} | parts()
    assert not [name for name in named if vague.fullmatch(name)]


def test_no_file_is_longer_than_a_reader_can_hold() -> None:
    for part in parts():
        for path in modules(part):
            lines = len(path.read_text(encoding="utf-8").splitlines())
            assert lines <= MAX_FILE_LINES, f"{path.relative_to(ROOT)} has {lines} lines"


def test_no_function_is_longer_than_a_screen() -> None:
    for part in parts():
        for path in modules(part):
            for node in nodes(path):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    lines = (node.end_lineno or 0) - node.lineno + 1
                    assert lines <= MAX_FUNCTION_LINES, f"{path.relative_to(ROOT)}: {node.name} has {lines} lines"
