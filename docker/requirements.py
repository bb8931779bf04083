"""Writes what the images install: parts of ``requirements.lock``, with the same versions and hashes and fewer packages.

``python docker/requirements.py`` writes ``docker/requirements/NAME.txt`` for each part of an image: ``runtime`` is in
every image, the others are added to it. Run it in ``.venv`` after ``requirements.lock`` has changed: what each package
needs is read from those that are installed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
DIRECTORY = ROOT / "docker" / "requirements"
#: The extras of ``setup.cfg`` that an image can have; the others are not in the lock.
EXTRAS = ("s3",)
HEAD = """\
# What {of}. Made from requirements.lock by
#     python docker/requirements.py
"""


def parts() -> dict[str, str]:
    """Return each part's file, by the part's name."""
    runtime = closure(_declared("options", "install_requires"))
    added = {
        **{extra: closure(_declared("options.extras_require", extra)) for extra in EXTRAS},
        "simulator": closure(["aiohttp", "cryptography"]),
        # What installs mailfleet itself, and is removed again.
        "build": closure(["setuptools"]),
    }
    told = {"simulator": "the simulator needs besides", "build": "only the build needs"}
    return {
        "runtime": _file("every image installs", runtime),
        **{
            name: _file(told.get(name, f"the extra {name} needs besides"), packages - runtime)
            for name, packages in added.items()
        },
    }


def _declared(section: str, key: str) -> list[str]:
    configuration = ConfigParser()
    configuration.read(ROOT / "setup.cfg")
    return configuration[section][key].strip().splitlines()


def closure(requirements: Iterable[str]) -> set[str]:
    """Return the names of the packages and of all that these need.

    What a marker rules out on this machine counts as well: the marker in the lock rules it out where it is installed.
    """
    found: set[tuple[str, str]] = set()
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        for extra in ("", *requirement.extras):
            key = canonicalize_name(requirement.name), extra
            if key not in found:
                found.add(key)
                waiting += _needs(requirement.name, extra)
    return {name for name, _ in found}


def _needs(name: str, extra: str) -> Iterator[Requirement]:
    try:
        texts = requires(name) or []
    except PackageNotFoundError:  # it is for another system or Python
        return
    for requirement in map(Requirement, texts):
        if _belongs(requirement, extra):
            yield requirement


def _belongs(requirement: Requirement, extra: str) -> bool:
    if requirement.marker is None:
        return not extra
    if "extra ==" not in str(requirement.marker):
        return not extra and canonicalize_name(requirement.name) in locked()
    return bool(extra) and requirement.marker.evaluate({**default_environment(), "extra": extra})


def locked() -> dict[str, str]:
    """Return the lock's entries, with markers and hashes, by the packages' names."""
    entries = re.split(r"^(?=[a-z0-9])", (ROOT / "requirements.lock").read_text(), flags=re.MULTILINE)[1:]
    return {canonicalize_name(re.split(r"[\[=]", entry, maxsplit=1)[0]): entry for entry in entries}


def _file(of: str, packages: set[str]) -> str:
    entries = locked()
    return HEAD.format(of=of) + "".join(entries[name] for name in sorted(packages))


def main() -> None:
    """Write the files."""
    DIRECTORY.mkdir(exist_ok=True)
    for name, text in parts().items():
        (DIRECTORY / f"{name}.txt").write_text(text)


if __name__ == "__main__":
    main()
