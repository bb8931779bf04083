"""Reads a Dockerfile and a .dockerignore as far as ours go; for docker/check.py and the tests."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import NamedTuple, Self


class Instruction(NamedTuple):
    """One instruction; its lines are joined."""

    name: str
    text: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)

    @property
    def listed(self) -> list[str]:
        """What stands in square brackets: the command of ENTRYPOINT, CMD and HEALTHCHECK."""
        listed: list[str] = json.loads(self.text[self.text.index("[") :])
        return listed


class Stage(NamedTuple):
    """One FROM with what follows it."""

    parent: str
    name: str
    instructions: list[Instruction]

    @property
    def suite(self) -> str:
        """The Debian release that the tag of a base image ends with."""
        return self.parent.partition("@")[0].rpartition("-")[2]


class Dockerfile(NamedTuple):
    """The stages in their order; the last one is the image that is built by default."""

    stages: list[Stage]

    @classmethod
    def read(cls, path: Path) -> Self:
        lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
        joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
        stages: list[Stage] = []
        for line in filter(None, map(str.strip, joined.splitlines())):
            name, _, text = line.partition(" ")
            if name == "FROM":
                parent, _, stage = text.partition(" AS ")
                stages.append(Stage(parent, stage, []))
            else:
                stages[-1].instructions.append(Instruction(name, text.strip()))
        return cls(stages)


def copied_files(root: Path, source: str) -> list[Path]:
    """Return what ``COPY source`` takes of the files that Git knows, in or outside of a commit, and does not ignore."""
    listed = subprocess.run(
        ["git", "-C", root, "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        check=True,
        capture_output=True,
        text=True,
    )
    paths = [Path(name) for name in listed.stdout.split("\0") if name and (root / name).exists()]
    rules = _rules((root / ".dockerignore").read_text())
    return [path for path in paths if path.is_relative_to(source) and not _ignored(path, rules)]


def _rules(text: str) -> list[tuple[re.Pattern[str], bool]]:
    lines = [line.strip() for line in text.splitlines()]
    return [(_pattern(line.lstrip("!")), not line.startswith("!")) for line in lines if line and line[0] != "#"]


def _pattern(glob: str) -> re.Pattern[str]:
    """Translate a pattern of .dockerignore, which also matches all that lies beneath what it names."""
    steps = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", glob)
    return re.compile("".join(steps.get(part, re.escape(part)) for part in parts) + "(?:/.*)?")


def _ignored(path: Path, rules: list[tuple[re.Pattern[str], bool]]) -> bool:
    """Say what the last rule says that matches."""
    said = [ignored for pattern, ignored in rules if pattern.fullmatch(str(path))]
    return bool(said) and said[-1]
