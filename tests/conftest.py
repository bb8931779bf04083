"""What tests share: private servers, a database of its own for each test that asks, and a simulated Graph.

``bin/test`` brings the servers along; a pytest started by hand starts them itself. `runtime` reads the environment when
it is imported, which a test module may do at its top, so a whole environment is in place before tests are collected.
"""

from __future__ import annotations

import logging
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import psycopg2
import pytest

import models
from migrations.__main__ import migrate
from sandbox.environment import fleet_settings
from sandbox.processes import free_port
from sandbox.servers import PRIVATE_MARKER, Servers
from simulator.control import Simulator

_running = ExitStack()
_graph_directory = Path(tempfile.mkdtemp(prefix="mailfleet-graph-"))
_graph = Simulator(f"https://localhost:{free_port()}", _graph_directory / "ca.pem")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Have servers that may be emptied, and settings that fit them and the simulator that `graph` starts."""
    session.config.add_cleanup(_running.close)
    if os.environ.get(PRIVATE_MARKER) != "1":
        directory = Path(_running.enter_context(tempfile.TemporaryDirectory(prefix="mailfleet-tests-")))
        directory.chmod(0o711)  # PostgreSQL's user has to get through
        servers = _running.enter_context(Servers(directory, durable=False, environment={}))
        os.environ.update(servers.environment | {PRIVATE_MARKER: "1"})
    settings = fleet_settings(_graph, ATTACHMENT_STORE_URL=f"file://{_graph_directory}/attachments")
    del settings["REQUESTS_CA_BUNDLE"]  # the file is there only while the simulator is
    os.environ.update(settings)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run whole fleets last: once started they go on consuming from the queues that the other tests fill.

    Of these, modules that want a fleet of their own kind come after those that share one, which takes seconds to start.
    """
    items.sort(key=lambda item: ("fleet" in item.path.parts, "Worlds" in vars(item.module)))  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _log_level() -> Iterator[None]:
    """Have each test begin with the level of the settings: a command of the command line sets its own."""
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)


@pytest.fixture(scope="session")
def servers() -> dict[str, str]:
    """The private servers' URLs, by the settings' names."""
    return {name: os.environ[name] for name in ("DATABASE_URL", "RABBITMQ_URL", "REDIS_URL")}


@pytest.fixture(scope="session")
def template_database(servers: dict[str, str]) -> Iterator[str]:
    """The name of a database that is migrated and never connected to again, so that it can be copied."""
    name = f"template_{secrets.token_hex(4)}"
    _administer(servers["DATABASE_URL"], f"CREATE DATABASE {name}")
    migrate(_named(servers["DATABASE_URL"], name))
    yield name
    _administer(servers["DATABASE_URL"], f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def database(servers: dict[str, str], template_database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty, migrated database for this test alone, to which `models` is connected."""
    name = f"test_{secrets.token_hex(4)}"
    _administer(servers["DATABASE_URL"], f"CREATE DATABASE {name} TEMPLATE {template_database}")
    url = _named(servers["DATABASE_URL"], name)
    monkeypatch.setenv("DATABASE_URL", url)  # for a `runtime` that is imported only now
    models.connect(url, "tests")
    yield url
    models.disconnect()
    _administer(servers["DATABASE_URL"], f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def graph_process() -> Iterator[Simulator]:
    """The Graph that the environment names, started by the first test that needs it."""
    with Simulator.start(_graph_directory, port=urlsplit(_graph.base_url).port or 0) as started:
        yield started


@pytest.fixture
def graph(graph_process: Simulator, monkeypatch: pytest.MonkeyPatch) -> Simulator:
    """The Graph that `runtime` speaks to, as new."""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", graph_process.ca_bundle)
    graph_process.reset()
    return graph_process


def _named(url: str, database_name: str) -> str:
    return urlsplit(url)._replace(path=f"/{database_name}").geturl()


def _administer(url: str, statement: str) -> None:
    connection = psycopg2.connect(url)
    try:
        connection.autocommit = True
        connection.cursor().execute(statement)
    finally:
        connection.close()
