"""The private servers: what a client finds, what a test may do to them, and that nothing is left of them."""

import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pika
import psycopg2
import pytest
import redis
from pika.exceptions import ChannelClosedByBroker, ProbableAuthenticationError

from sandbox.processes import wait_until
from sandbox.programs import ServerFailed
from sandbox.servers import NotOurs, Servers

ROOT = Path(__file__).parents[1]
SOON = timedelta(seconds=10)

#: Nobody listens there, so that any attempt to use or stop one of these would be an error.
GIVEN = {
    "DATABASE_URL": "postgresql://given@127.0.0.1:1/given",
    "RABBITMQ_URL": "amqp://127.0.0.1:1",
    "REDIS_URL": "redis://127.0.0.1:1/0",
}
ONLY_REDIS_OURS = {name: url for name, url in GIVEN.items() if name != "REDIS_URL"}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with Servers(tmp_path_factory.mktemp("with space"), durable=False, environment={}) as started:
        yield started


@pytest.fixture
def redis_run(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """``python -m sandbox.servers`` with a Redis of its own, after it has printed its environment."""
    with subprocess.Popen(
        [sys.executable, "-m", "sandbox.servers", f"--directory={tmp_path}"],
        cwd=ROOT, env=os.environ | GIVEN | {"REDIS_URL": ""}, stdout=subprocess.PIPE, text=True,
        # A shell has what it starts in the background ignore the signal, and so has whoever inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:  # fmt: skip
        yield process
        process.kill()


def query(servers: Servers, sql: str) -> list[tuple[object, ...]]:
    connection = psycopg2.connect(servers.postgresql.url)
    try:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(sql)
            return cursor.fetchall() if cursor.description else []
    finally:
        connection.close()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def printed_redis_port(run: subprocess.Popen[str]) -> int:
    assert run.stdout is not None
    lines = [run.stdout.readline() for _ in GIVEN]
    return int(next(line for line in lines if "REDIS_URL" in line).rpartition(":")[2].partition("/")[0])


def guard_of(owner: int) -> int:
    return next(
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if f"\nPPid:\t{owner}\n" in (path.parent / "status").read_text() and b"processes.py" in path.read_bytes()
    )


def test_each_url_of_the_environment_leads_to_a_server_that_answers(servers: Servers) -> None:
    environment = servers.environment

    assert query(servers, "SELECT current_database()") == [("mailfleet",)]
    with redis.Redis.from_url(environment["REDIS_URL"]) as client:
        assert client.ping()
    connection = pika.BlockingConnection(pika.URLParameters(environment["RABBITMQ_URL"]))
    connection.close()
    assert environment["DATABASE_URL"] == servers.postgresql.url
    assert servers.ours


def test_a_client_without_the_password_is_refused(servers: Servers) -> None:
    with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
        psycopg2.connect(servers.postgresql.url.replace(servers.postgresql.password, "guess"))
    with (
        redis.Redis.from_url(servers.redis.url.replace(servers.redis.password, "guess")) as client,
        pytest.raises(redis.AuthenticationError),
    ):
        client.ping()
    with pytest.raises(ProbableAuthenticationError):
        pika.BlockingConnection(pika.URLParameters(servers.rabbitmq.url.replace(servers.rabbitmq.password, "guess")))


def test_the_servers_listen_on_loopback_only(servers: Servers) -> None:
    listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines() if " 0A " in line]
    everywhere = [line.split()[1] for line in Path("/proc/net/tcp6").read_text().splitlines() if " 0A " in line]

    for server in (servers.postgresql, servers.rabbitmq, servers.redis):
        assert f"0100007F:{server.port:04X}" in listening
        assert not [address for address in everywhere if address.endswith(f":{server.port:04X}")]


def test_no_password_is_in_the_process_list(servers: Servers) -> None:
    command_lines = b"".join(path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists())

    for server in (servers.postgresql, servers.rabbitmq, servers.redis):
        assert server.password.encode() not in command_lines


def test_a_killed_database_comes_back_with_what_was_committed(servers: Servers) -> None:
    query(servers, "CREATE TABLE kept AS SELECT 42 AS answer")

    servers.postgresql.kill()
    assert not listens(servers.postgresql.port)
    servers.postgresql.start()

    assert query(servers, "SELECT answer FROM kept") == [(42,)]


def test_a_stopped_database_ends_although_a_client_is_connected(servers: Servers) -> None:
    client = psycopg2.connect(servers.postgresql.url)

    servers.postgresql.stop()
    assert not listens(servers.postgresql.port)
    servers.postgresql.start()

    client.close()
    assert query(servers, "SELECT 1") == [(1,)]


def test_a_killed_broker_comes_back_with_its_persistent_messages(servers: Servers) -> None:
    with pika.BlockingConnection(pika.URLParameters(servers.rabbitmq.url)) as connection:
        channel = connection.channel()
        channel.queue_declare("kept", durable=True)
        channel.confirm_delivery()
        channel.basic_publish("", "kept", b"body", pika.BasicProperties(delivery_mode=2))

    servers.rabbitmq.kill()
    assert not listens(servers.rabbitmq.port)
    servers.rabbitmq.start()

    kept = [{"name": "kept", "messages": 1}]
    assert wait_until(lambda: servers.rabbitmq.list_queues("name", "messages") == kept, SOON)
    assert servers.rabbitmq.rabbitmqctl("eval", "1 + 1.").strip() == "2"


def test_a_wiped_broker_is_a_new_one_at_the_same_address(servers: Servers) -> None:
    url = servers.rabbitmq.url
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        channel = connection.channel()
        channel.exchange_declare("lost", durable=True)
        channel.queue_declare("lost", durable=True)
        channel.queue_bind("lost", "lost", "lost")

    servers.rabbitmq.wipe()

    assert servers.rabbitmq.url == url
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        for declare in ("exchange_declare", "queue_declare"):
            with pytest.raises(ChannelClosedByBroker, match="NOT_FOUND"):
                getattr(connection.channel(), declare)("lost", passive=True)
    assert servers.rabbitmq.list_queues("name") == []


def test_redis_is_empty_after_a_wipe_and_after_every_start(servers: Servers) -> None:
    def stop_and_start() -> None:
        servers.redis.stop()
        servers.redis.start()

    def kill_and_start() -> None:
        servers.redis.kill()
        servers.redis.start()

    with redis.Redis.from_url(servers.redis.url) as client:
        for lose in (servers.redis.wipe, stop_and_start, kill_and_start):
            client.set("key", "value")
            lose()
            assert client.keys() == []


def test_a_suspended_server_answers_again_only_when_it_is_resumed(servers: Servers) -> None:
    with redis.Redis.from_url(servers.redis.url, socket_timeout=0.2, retry=None) as client:
        servers.redis.suspend()
        with pytest.raises(redis.TimeoutError):
            client.ping()

        servers.redis.resume()
        assert wait_until(client.ping, SOON)


def test_servers_that_are_given_are_used_and_left_alone(tmp_path: Path) -> None:
    with Servers(tmp_path, environment=GIVEN) as servers:
        assert servers.environment == GIVEN
        assert not servers.ours
        for touch in ("kill", "stop", "suspend", "wipe", "rabbitmqctl"):
            with pytest.raises(NotOurs):
                getattr(servers.redis, touch)()


def test_nothing_is_left_after_the_block(tmp_path: Path) -> None:
    with Servers(tmp_path, environment=ONLY_REDIS_OURS) as servers:
        assert listens(servers.redis.port)

    assert not listens(servers.redis.port)
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_to_be_kept_are_there_until_the_next_run(tmp_path: Path) -> None:
    with Servers(tmp_path, keep=True, environment=ONLY_REDIS_OURS) as kept:
        pass
    assert (kept.directory / "redis" / "log").exists()
    assert not listens(kept.redis.port)

    with Servers(tmp_path, environment=ONLY_REDIS_OURS):
        assert not kept.directory.exists()


def test_two_runs_in_one_directory_do_not_meet(tmp_path: Path) -> None:
    with (
        Servers(tmp_path, environment=ONLY_REDIS_OURS) as first,
        Servers(tmp_path, environment=ONLY_REDIS_OURS) as second,
    ):
        assert first.redis.port != second.redis.port
        assert listens(first.redis.port)
        assert listens(second.redis.port)


def test_a_server_that_does_not_start_says_why_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "bin" / "redis-server"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\necho out of cheese\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{broken.parent}:{os.environ['PATH']}")

    with (
        pytest.raises(ServerFailed, match="redis ended with status 3\nout of cheese"),
        Servers(tmp_path / "local", environment=ONLY_REDIS_OURS),
    ):
        pass

    assert list((tmp_path / "local").iterdir()) == []


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 0), (signal.SIGKILL, -signal.SIGKILL), (signal.SIGHUP, -signal.SIGHUP)],
)
def test_servers_end_with_their_owner_however_it_ends(
    redis_run: subprocess.Popen[str], tmp_path: Path, number: signal.Signals, status: int
) -> None:
    port = printed_redis_port(redis_run)
    assert listens(port)

    redis_run.send_signal(number)

    assert redis_run.wait(SOON.total_seconds()) == status
    assert wait_until(lambda: not listens(port) and not list(tmp_path.iterdir()), SOON)


def test_servers_end_with_their_owner_although_a_process_that_it_forked_lives_on(tmp_path: Path) -> None:
    owner = f"""
import os, pathlib, signal, sys
from sandbox.servers import Servers
with Servers(pathlib.Path({str(tmp_path)!r}), environment={ONLY_REDIS_OURS!r}) as servers:
    forked = os.fork()
    if forked:
        print(servers.redis.port, forked, flush=True)
    signal.pause()
"""
    with subprocess.Popen([sys.executable, "-c", owner], cwd=ROOT, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        port, forked = map(int, run.stdout.readline().split())
        run.kill()
        run.wait()

    try:
        assert wait_until(lambda: not listens(port) and not list(tmp_path.iterdir()), SOON)
    finally:
        os.kill(forked, signal.SIGKILL)


def test_the_next_run_removes_one_that_was_killed_with_its_guard(
    redis_run: subprocess.Popen[str], tmp_path: Path
) -> None:
    port = printed_redis_port(redis_run)
    os.kill(guard_of(redis_run.pid), signal.SIGKILL)
    redis_run.kill()
    redis_run.wait()
    assert listens(port)
    [left] = tmp_path.iterdir()

    with Servers(tmp_path, environment=ONLY_REDIS_OURS):
        assert not listens(port)
        assert not left.exists()


def test_a_command_runs_with_the_servers_and_its_exit_status_is_passed_on(tmp_path: Path) -> None:
    look = 'echo "$REDIS_URL|$DATABASE_URL|$MAILFLEET_TEST_SERVERS"; exit 7'
    environment = {name: value for name, value in os.environ.items() if name != "MAILFLEET_TEST_SERVERS"}

    ran = subprocess.run(
        [sys.executable, "-m", "sandbox.servers", f"--directory={tmp_path}", "--", "sh", "-c", look],
        cwd=ROOT, env=environment | GIVEN, stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip

    assert ran.returncode == 7
    # The marker, which allows a command to empty the servers, is not set when one of them was given.
    assert ran.stdout == f"{GIVEN['REDIS_URL']}|{GIVEN['DATABASE_URL']}|\n"


def test_the_environment_file_is_for_its_owner_only(tmp_path: Path) -> None:
    env_file = tmp_path / "environment"
    with subprocess.Popen(
        [sys.executable, "-m", "sandbox.servers", f"--directory={tmp_path / 'local'}", f"--env-file={env_file}"],
        cwd=ROOT, env=os.environ | GIVEN, stdout=subprocess.DEVNULL,
    ) as run:  # fmt: skip
        assert wait_until(lambda: env_file.exists() and env_file.read_text().count("\n") == 3, SOON)
        run.terminate()

    assert stat.S_IMODE(env_file.stat().st_mode) == 0o600
    sourced = subprocess.check_output(["sh", "-c", f". {env_file}; echo $RABBITMQ_URL"], text=True)
    assert sourced == f"{GIVEN['RABBITMQ_URL']}\n"
