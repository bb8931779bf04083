"""Servers as containers, with a stand-in for the engine's command line that writes down how it was called."""

from collections.abc import Callable
from pathlib import Path

import pytest

from sandbox.programs import NotInstalled, ServerFailed
from sandbox.servers import Servers

GIVEN = {"DATABASE_URL": "postgresql://given@127.0.0.1:1/given", "RABBITMQ_URL": "amqp://127.0.0.1:1"}

Engine = Callable[[str], Path]


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Install a ``docker`` that notes each call and then does what its argument says; there is no redis-server."""

    def install(then: str) -> Path:
        calls = tmp_path / "calls"
        docker = tmp_path / "bin" / "docker"
        docker.parent.mkdir()
        docker.write_text(f'#!/bin/sh\necho "$@" >> "{calls}"\n{then}\n')
        docker.chmod(0o755)
        monkeypatch.setenv("PATH", str(docker.parent))
        return calls

    return install


def verbs(calls: Path) -> list[str]:
    """Return what Compose was asked, without the options that say of which project."""
    lines = [line.split() for line in calls.read_text().splitlines() if "--project-name" in line]
    return [" ".join(line[4:]) for line in lines]


def test_a_server_without_a_program_runs_as_a_container_until_the_block_ends(engine: Engine, tmp_path: Path) -> None:
    calls = engine("exit 0")

    with Servers(tmp_path / "local", environment=GIVEN) as servers:
        servers.redis.suspend()
        servers.redis.resume()
        servers.redis.kill()
        servers.redis.start()
        servers.redis.wipe()
        servers.redis.stop()
        assert servers.redis.ours
        assert servers.environment["REDIS_URL"].startswith("redis://:")

    up = "up --detach --wait redis"
    assert verbs(calls) == [
        up, "pause redis", "unpause redis", "kill redis", up, "rm --stop --force --volumes redis", up, "stop redis",
        "down --volumes --timeout=0",
    ]  # fmt: skip
    assert list((tmp_path / "local").iterdir()) == []


def test_the_passwords_are_not_on_the_command_line_but_in_a_private_file(engine: Engine, tmp_path: Path) -> None:
    calls = engine("exit 0")

    with Servers(tmp_path / "local", environment=GIVEN) as servers:
        [environment_file] = tmp_path.glob("local/*/compose.env")
        password = servers.redis.url.removeprefix("redis://:").partition("@")[0]
        assert f"REDIS_PASSWORD={password}\n" in environment_file.read_text()
        assert environment_file.stat().st_mode & 0o077 == 0

    assert password not in calls.read_text()


def test_a_container_that_does_not_start_says_why_and_is_removed(engine: Engine, tmp_path: Path) -> None:
    calls = engine('case "$*" in *" up "*) echo no such image >&2; exit 1;; esac')

    with pytest.raises(ServerFailed, match="no such image"), Servers(tmp_path / "local", environment=GIVEN):
        pass

    assert verbs(calls)[-1].startswith("down")


def test_without_a_program_and_an_engine_the_missing_server_is_named(engine: Engine, tmp_path: Path) -> None:
    engine("exit 1")

    with pytest.raises(NotInstalled, match="Redis"), Servers(tmp_path / "local", environment=GIVEN):
        pass

    assert list((tmp_path / "local").iterdir()) == []
