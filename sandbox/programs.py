"""The three servers as installed programs, each with its own idea of files, users, readiness and a clean end."""

import contextlib
import json
import os
import pwd
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
from abc import ABC, abstractmethod
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

from sandbox.processes import Guard, Tree, free_port, wait_until

START_LIMIT = timedelta(seconds=90)
STOP_LIMIT = timedelta(seconds=30)

LOG_LINES_SHOWN = 15


class ServerFailed(Exception):
    """A server did not come up; the text ends with what it last wrote."""


class NotInstalled(Exception):
    """There is no program for a server on this machine."""


class Program(ABC):
    """One server of ours. Its port, password and data stay the same however often it is killed and started."""

    name: ClassVar[str]
    variable: ClassVar[str]
    clean_end: ClassVar[signal.Signals] = signal.SIGTERM
    farewell: ClassVar[signal.Signals] = signal.SIGKILL
    user: str | None = None
    ours = True

    def __init__(self, directory: Path, guard: Guard, *, durable: bool) -> None:
        """Note where to live; nothing is written or started yet.

        Raises:
            NotInstalled: The program is not on this machine.
        """
        self.directory = directory / self.name
        self.port = free_port()
        self.password = secrets.token_hex(16)
        self.log = self.directory / "log"
        self._guard = guard
        self._durable = durable
        self._tree: Tree | None = None
        self.program = self.find()

    @property
    @abstractmethod
    def url(self) -> str: ...

    @classmethod
    @abstractmethod
    def find(cls) -> Path:
        """Return the server's program.

        Raises:
            NotInstalled: There is none.
        """

    @abstractmethod
    def prepare(self) -> None:
        """Write the configuration, and the data directory if it has one. Called before the first start only."""

    @abstractmethod
    def command(self) -> list[str]: ...

    @abstractmethod
    def answers(self) -> bool:
        """Whether a client is served."""

    def environment(self) -> dict[str, str]:
        """Return the server's whole environment: settings that a developer's shell has for other servers stay out."""
        return {"HOME": str(self.directory), "LANG": "C.UTF-8", "PATH": os.environ["PATH"]}

    def start(self) -> None:
        """Start the server and wait until it answers. A server that runs is left alone.

        Raises:
            ServerFailed: It ended, or gave no answer for a minute and a half.
        """
        if self._tree and self._tree.alive:
            return
        if self._tree:
            self._tree.kill()  # what the command left behind when it ended by itself
        else:
            self.directory.mkdir(mode=0o700)
            self.prepare()
        self._tree = Tree(
            self.command(),
            guard=self._guard,
            environment=self.environment(),
            directory=self.directory,
            log=self.log,
            user=self.user,
            farewell=self.farewell,
        )
        self._wait_until_it_answers(self._tree)

    def stop(self) -> None:
        """End the server cleanly, whatever its clients do, and return when it is gone."""
        if self._tree:
            self._tree.resume()
            self._tree.signal(self.clean_end)
            self._tree.wait(STOP_LIMIT)

    def kill(self) -> None:
        """SIGKILL the server with all its processes and return when they are gone."""
        if self._tree:
            self._tree.kill()

    def suspend(self) -> None:
        """Freeze the server: its connections stay open, and nobody answers."""
        if self._tree:
            self._tree.suspend()

    def resume(self) -> None:
        if self._tree:
            self._tree.resume()

    def pids(self) -> set[int]:
        """Return the server's living processes."""
        return self._tree.members() if self._tree else set()

    def _wait_until_it_answers(self, tree: Tree) -> None:
        wait_until(lambda: not tree.alive or self.answers(), START_LIMIT)
        if not self.answers():
            fate = "does not answer" if tree.alive else f"ended with status {tree.exit_status}"
            raise ServerFailed(f"{self.name} {fate}\n{last_lines(self.log)}")


class PostgreSQL(Program):
    """A cluster with the one database ``mailfleet``.

    Without ``durable`` nothing is flushed to the disk. A SIGKILL loses no commit even so: what the server has written
    is in the kernel's cache, which only a crash of the machine empties.
    """

    name = "postgresql"
    variable = "DATABASE_URL"
    clean_end = signal.SIGINT  # SIGTERM would wait for every client to leave
    farewell = signal.SIGQUIT  # leaves no shared memory behind, as SIGKILL would

    def __init__(self, directory: Path, guard: Guard, *, durable: bool) -> None:
        super().__init__(directory, guard, durable=durable)
        if os.geteuid() == 0:  # it refuses to run as root
            self.user = next((name for name in ("postgres", "nobody") if _exists(name)), None)
            if not _all_may_enter(directory):
                self.directory = Path(tempfile.mkdtemp(prefix="mailfleet-")) / self.name
                self.directory.parent.chmod(0o711)
                self.log = self.directory / "log"
                guard.remove(self.directory.parent)
        self._data = self.directory / "data"

    @classmethod
    def find(cls) -> Path:
        installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[4]))
        # From 13 on: the first release that the migrations are made for.
        candidates = [path for path in reversed(installed) if int(path.parts[4]) >= 13]
        return _program("PostgreSQL", candidates, "postgres")

    @property
    def url(self) -> str:
        return f"postgresql://mailfleet:{self.password}@127.0.0.1:{self.port}/mailfleet"

    def prepare(self) -> None:
        if self.user:
            os.chown(self.directory, pwd.getpwnam(self.user).pw_uid, pwd.getpwnam(self.user).pw_gid)
        password_file = self.directory / "password"
        write_privately(password_file, self.password, owner=self.user)
        self._run(
            "initdb", f"--pgdata={self._data}", "--username=mailfleet", f"--pwfile={password_file}",
            "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync",
        )  # fmt: skip
        password_file.unlink()
        with (self._data / "postgresql.conf").open("a") as configuration:
            configuration.write(self._configuration())
        self._run("postgres", "--single", "-D", str(self._data), "postgres", stdin="CREATE DATABASE mailfleet\n")

    def command(self) -> list[str]:
        # A killed server leaves its process id, which may by now be another process's.
        (self._data / "postmaster.pid").unlink(missing_ok=True)
        return [str(self.program), "-D", str(self._data)]

    def answers(self) -> bool:
        import psycopg2  # here, so that `find` needs no installed package

        with contextlib.suppress(psycopg2.OperationalError):
            psycopg2.connect(self.url, connect_timeout=5).close()
            return True
        return False

    def _configuration(self) -> str:
        settings = {
            "port": self.port,
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "max_connections": 300,
            "dynamic_shared_memory_type": "mmap",  # in the data directory, so that it goes with it
            "log_min_messages": "warning",
            "fsync": "on" if self._durable else "off",
            "full_page_writes": "on" if self._durable else "off",
        }
        return "".join(f"{name} = '{value}'\n" for name, value in settings.items())

    def _run(self, program: str, *arguments: str, stdin: str = "") -> None:
        finished = subprocess.run(
            [str(self.program.with_name(program)), *arguments],
            input=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
            cwd=self.directory, env=self.environment(),
            user=self.user, group=self.user, extra_groups=[] if self.user else None,
        )  # fmt: skip
        if finished.returncode:
            raise ServerFailed(f"{program} ended with status {finished.returncode}\n{finished.stdout[-2000:]}")


class RabbitMQ(Program):
    """A broker without plugins, with a name, a cookie and an epmd of its own, so that it never meets another one."""

    name = "rabbitmq"
    variable = "RABBITMQ_URL"

    def __init__(self, directory: Path, guard: Guard, *, durable: bool) -> None:
        super().__init__(directory, guard, durable=durable)
        self._node = f"mailfleet-{secrets.token_hex(4)}@localhost"
        self._epmd_port = free_port()
        self._distribution_port = free_port()
        self._data = self.directory / "data"

    @classmethod
    def find(cls) -> Path:
        # Debian's program on the PATH changes the user and the directory; the one that it calls does not.
        program = _program("RabbitMQ", [Path("/usr/lib/rabbitmq/bin/rabbitmq-server")], "rabbitmq-server")
        _program("Erlang's epmd", [], "epmd")
        return program

    @property
    def url(self) -> str:
        return f"amqp://mailfleet:{self.password}@127.0.0.1:{self.port}/%2F"

    def prepare(self) -> None:
        write_privately(self.directory / ".erlang.cookie", secrets.token_hex(16))
        (self.directory / ".erlang.cookie").chmod(0o400)
        (self.directory / "enabled_plugins").write_text("[].\n")
        (self.directory / "conf.d").mkdir()
        write_privately(
            self.directory / "rabbitmq.conf",
            f"listeners.tcp.1 = 127.0.0.1:{self.port}\n"
            f"default_user = mailfleet\ndefault_pass = {self.password}\n"
            "vm_memory_high_watermark.absolute = 1GiB\ndisk_free_limit.absolute = 50MB\n"
            "log.console = false\nlog.file.level = warning\n",
        )
        self._start_epmd()

    def environment(self) -> dict[str, str]:
        own = str(self.directory)
        return super().environment() | {
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(self._epmd_port),
            "RABBITMQ_ADVANCED_CONFIG_FILE": f"{own}/advanced.config",
            # With input allowed the script becomes the server, instead of waiting above it and trapping its signals.
            "RABBITMQ_ALLOW_INPUT": "true",
            "RABBITMQ_CONFIG_FILE": f"{own}/rabbitmq.conf",
            "RABBITMQ_CONFIG_FILES": f"{own}/conf.d",
            "RABBITMQ_CONF_ENV_FILE": f"{own}/rabbitmq-env.conf",
            "RABBITMQ_CTL_DIST_PORT_MIN": "0",
            "RABBITMQ_CTL_DIST_PORT_MAX": "0",
            "RABBITMQ_DIST_PORT": str(self._distribution_port),
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{own}/enabled_plugins",
            "RABBITMQ_LOG_BASE": f"{own}/logs",
            "RABBITMQ_MNESIA_BASE": str(self._data),
            "RABBITMQ_NODENAME": self._node,
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-noinput -start_epmd false -kernel inet_dist_use_interface "
            "{127,0,0,1} +S 2:2",
        }

    def command(self) -> list[str]:
        return [str(self.program)]

    def answers(self) -> bool:
        """Whether it greets a client. It listens only once all that it recovers or creates at a start is there."""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
            connection.sendall(b"AMQP\x00\x00\x09\x01")
            return connection.recv(1) == b"\x01"  # a method frame: connection.start
        return False

    def rabbitmqctl(self, *arguments: str) -> str:
        """Run one command of RabbitMQ's own tool, which takes about half a second, and return what it prints.

        Raises:
            subprocess.CalledProcessError: The tool answered with an error.
        """
        tool = self.program.with_name("rabbitmqctl")
        return subprocess.run(
            [str(tool), "--quiet", *arguments], env=self.environment(), stdin=subprocess.DEVNULL,
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip

    def list_queues(self, *columns: str) -> list[dict[str, Any]]:
        """Return a row per queue, as in ``list_queues("name", "messages_ready")``."""
        rows: list[dict[str, Any]] = json.loads(self.rabbitmqctl("list_queues", "--formatter=json", *columns))
        return rows

    def wipe(self) -> None:
        """Lose everything, as a new node in the place of a lost disk would have: queues, exchanges, bindings, messages.

        Port, user and virtual host stay. Returns when the server answers again.
        """
        self.kill()
        shutil.rmtree(self._data)
        self.start()

    def _start_epmd(self) -> None:
        """Start the port mapper, which the server would otherwise start as a daemon that outlives it."""
        Tree(
            ["epmd", "-port", str(self._epmd_port), "-address", "127.0.0.1"],
            guard=self._guard, environment=self.environment(), directory=self.directory, log=self.log,
        )  # fmt: skip


class Redis(Program):
    """A Redis that keeps nothing over a restart: whatever the product has there it must be able to lose."""

    name = "redis"
    variable = "REDIS_URL"

    @classmethod
    def find(cls) -> Path:
        return _program("Redis", [], "redis-server")

    @property
    def url(self) -> str:
        return f"redis://:{self.password}@127.0.0.1:{self.port}/0"

    def prepare(self) -> None:
        write_privately(
            self.directory / "redis.conf",
            f'bind 127.0.0.1\nport {self.port}\nrequirepass {self.password}\ndaemonize no\nsave ""\nappendonly no\n',
        )

    def command(self) -> list[str]:
        return [str(self.program), "redis.conf"]

    def answers(self) -> bool:
        import redis

        with contextlib.suppress(redis.RedisError), redis.Redis.from_url(self.url) as client:
            return bool(client.ping())
        return False

    def wipe(self) -> None:
        """Empty it, as a failover to an empty replica would."""
        import redis

        with redis.Redis.from_url(self.url) as client:
            client.flushall()


def _program(server: str, candidates: list[Path], command: str) -> Path:
    """Return the first of ``candidates`` that exists, else ``command`` from the PATH."""
    if found := next((path for path in candidates if os.access(path, os.X_OK)), shutil.which(command)):
        return Path(found)
    raise NotInstalled(f"{server} is not installed; bin/setup says how to provide it")


def _exists(user: str) -> bool:
    with contextlib.suppress(KeyError):
        return bool(pwd.getpwnam(user))
    return False


def _all_may_enter(directory: Path) -> bool:
    """Whether every user can reach ``directory``; a home directory's owner is often the only one who can."""
    return all(path.stat().st_mode & stat.S_IXOTH for path in (directory, *directory.parents))


def last_lines(log: Path) -> str:
    with contextlib.suppress(FileNotFoundError):
        return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:])
    return ""


def write_privately(path: Path, text: str, *, owner: str | None = None) -> None:
    """Write a new file that only ``owner`` (default: we) may read, at no instant anybody else."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    if owner:
        os.chown(path, pwd.getpwnam(owner).pw_uid, -1)
