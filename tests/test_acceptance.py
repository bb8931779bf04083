"""What the documentation names is there: the proofs of docs/acceptance.md, and the pages and headings of each link."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import click
import pytest
from pages import anchors

import cli

ROOT = Path(__file__).resolve().parent.parent
ROWS = re.findall(r"^\| (?!---)(.+) \|$", (ROOT / "docs" / "acceptance.md").read_text(), re.MULTILINE)
#: Of each row, what stands in its last column.
PROOFS = [proof for row in ROWS if (proof := row.rpartition(" | ")[2]) != "shown by"]


def names(proof: str) -> list[str]:
    return re.findall(r"`([^`]+)`", proof)


def exists(name: str) -> bool:
    """Whether a named test, command or file is there."""
    if name.startswith("mailfleet "):
        return is_command(name.split()[1:])
    if name.startswith("python -m "):
        return importlib.util.find_spec(name.split()[2]) is not None
    file, _, test = name.partition("::")
    if not (ROOT / file).name.startswith("test_"):
        return (ROOT / file).exists()
    return test in collected(file) if test else bool(collected(file))


def is_command(words: list[str]) -> bool:
    command: click.Command | None = cli.main
    for word in words:
        command = command.commands.get(word) if isinstance(command, click.Group) else None
    return command is not None


def collected(file: str) -> set[str]:
    """The names of the tests that pytest finds in a file; those that are skipped here are among them."""
    return everything_collected().get(file, set())


@cache
def everything_collected() -> dict[str, set[str]]:
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "--collect-only", "-q"]
    environment = {**os.environ, "PYTEST_ADDOPTS": ""}  # "-v" would have other lines printed
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found: dict[str, set[str]] = {}
    for line in ended.stdout.splitlines():
        file, _, test = line.partition("::")
        found.setdefault(file, set()).add(test.partition("[")[0])
    return found


@pytest.mark.parametrize("name", sorted({name for proof in PROOFS for name in names(proof)}))
def test_every_named_proof_exists(name: str) -> None:
    assert exists(name)


@pytest.mark.parametrize("proof", PROOFS)
def test_every_criterion_has_a_proof(proof: str) -> None:
    assert names(proof)


@pytest.mark.parametrize(
    "name",
    [
        "tests/test_acceptance.py::test_none",
        "tests/test_acceptance.py::collected",  # a helper
        "tests/test_none.py",
        "tests/none.py",
        "mailfleet halt",
        "mailfleet dlq halt",
        "docs/none.md",
    ],
)
def test_a_proof_that_does_not_exist_would_be_found(name: str) -> None:
    assert not exists(name)


# Links

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])


def leads_nowhere(page: Path, link: str) -> bool:
    name, _, anchor = link.partition("#")
    target = page.parent / name if name else page
    return not target.exists() or bool(anchor and anchor not in anchors(target))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_page_or_heading_of_ours_leads_there(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text())
    assert [link for link in links if leads_nowhere(page, link)] == []


def test_every_page_is_linked_from_the_readme() -> None:
    linked = set(re.findall(r"\]\((docs/[^)#]+)", (ROOT / "README.md").read_text()))
    assert {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} <= linked


def test_a_link_that_leads_nowhere_would_be_found() -> None:
    readme = ROOT / "README.md"
    assert leads_nowhere(readme, "docs/none.md")
    assert leads_nowhere(readme, "docs/operations.md#none")
    assert not leads_nowhere(readme, "docs/operations.md#dead-letters")
