#!/usr/bin/env python3
"""Runs what the Dockerfile says in a bare Debian, where no container engine is: builds both images, then uses them.

    .venv/bin/python -m sandbox.servers -- python3 docker/check.py [--extras s3] [--keep DIRECTORY [--again]]

As root, with debootstrap or mmdebstrap installed. Each stage is a directory; RUN is a chroot. The images then run as an
engine would run them: as their user, alone in a process namespace, with a read-only root and an empty /tmp. Every
process type is started on the servers that DATABASE_URL, RABBITMQ_URL and REDIS_URL name, a mail is sent through the
simulator's image and archived, and each process has to answer its health check and end within 15 s of SIGTERM.

What differs from an image: Python is Debian's own, of the same minor version as the image's.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from dockerfile import Dockerfile, Stage, copied_files

ROOT = Path(__file__).resolve().parents[1]
STOP_LIMIT_SECONDS = 15
START_LIMIT_SECONDS = 180
#: What pip and TLS need to know of the network that the machine is in.
NETWORK_FILES = ("/etc/resolv.conf", "/etc/hosts", "/etc/pip.conf", "/etc/ssl/certs/ca-certificates.crt")
NETWORK_VARIABLES = ("pip_", "http_proxy", "https_proxy", "no_proxy", "ssl_cert_file")


def bare_debian(suite: str, directory: Path) -> Path:
    """Make a Debian with Python and nothing else, or take the one that is there already."""
    bare = directory / f"bare-{suite}"
    if (bare / "usr/bin/python3").exists():
        return bare
    packages = "python3,python3-venv,ca-certificates"
    if shutil.which("mmdebstrap"):
        command = ["mmdebstrap", "--variant=minbase", f"--include={packages}", suite, str(bare)]
    elif shutil.which("debootstrap"):
        command = ["debootstrap", "--variant=minbase", f"--include={packages}", suite, str(bare)]
    else:
        sys.exit("docker/check.py: neither debootstrap nor mmdebstrap is installed")
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return bare


class Image:
    """A stage as a directory, with what its instructions have set."""

    def __init__(self, root: Path, environment: dict[str, str] | None = None) -> None:
        self.root = root
        self.environment = environment or {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        self.work_directory = "/"
        self.user = "0:0"
        self.entrypoint: list[str] = []
        self.command: list[str] = []
        self.health: list[str] = []

    def based_on_this(self, root: Path) -> Image:
        subprocess.run(["cp", "--archive", "--reflink=auto", self.root, root], check=True)
        made = Image(root, dict(self.environment))
        made.work_directory = self.work_directory
        return made

    def run(self, command: str, arguments: dict[str, str]) -> None:
        """Run a line of the Dockerfile, as root, with the network of this machine."""
        environment = {"PIP_QUIET": "1", **_network(), **self.environment, **arguments}
        inside = 'cd "$1"; shift; exec "$@"'
        subprocess.run(
            ["chroot", self.root, "/bin/sh", "-ec", inside, "sh", self.work_directory, "/bin/sh", "-c", command],
            env=environment,
            check=True,
        )

    def place(self, path: str) -> Path:
        """Return where a path of the image, absolute or not, is on this machine."""
        return self.root / (Path(self.work_directory) / path).relative_to("/")


def _network() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.lower().startswith(NETWORK_VARIABLES)}


def _copy_network_files(root: Path) -> None:
    for name in filter(os.path.exists, NETWORK_FILES):
        target = root / name.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        shutil.copy(name, target)
    # The image's Python is `python` as well.
    (root / "usr/local/bin/python").symlink_to("/usr/bin/python3")


def build(dockerfile: Dockerfile, directory: Path, extras: str) -> dict[str, Image]:
    """Build every stage in a directory of its own."""
    images: dict[str, Image] = {}
    for stage in dockerfile.stages:
        print(f"stage {stage.name}", flush=True)
        root = directory / stage.name
        if root.exists():
            shutil.rmtree(root)
        if stage.parent in images:
            images[stage.name] = images[stage.parent].based_on_this(root)
        else:
            images[stage.name] = Image(bare_debian(stage.suite, directory)).based_on_this(root)
            _copy_network_files(root)
        _follow(stage, images[stage.name], images, extras)
    return images


def built(dockerfile: Dockerfile, directory: Path) -> dict[str, Image]:
    """Return the images that an earlier run has built there."""
    images: dict[str, Image] = {}
    for stage in dockerfile.stages:
        parent = images.get(stage.parent)
        images[stage.name] = Image(directory / stage.name, dict(parent.environment) if parent else None)
        images[stage.name].work_directory = parent.work_directory if parent else "/"
        kept = [instruction for instruction in stage.instructions if instruction.name not in {"RUN", "COPY"}]
        _follow(Stage(stage.parent, stage.name, kept), images[stage.name], images, "")
    return images


def _follow(stage: Stage, image: Image, images: dict[str, Image], extras: str) -> None:
    arguments: dict[str, str] = {}
    for instruction in stage.instructions:
        match instruction.name:
            case "RUN":
                image.run(instruction.text, arguments)
            case "COPY":
                _copy(instruction.words, image, images)
            case "ARG":
                name, _, default = instruction.words[0].partition("=")
                arguments[name] = extras if name == "EXTRAS" else default
            case "ENV":
                for word in instruction.words:
                    name, _, value = word.partition("=")
                    image.environment[name] = value.replace("$PATH", image.environment["PATH"])
            case "WORKDIR":
                image.work_directory = instruction.words[0]
                image.place(".").mkdir(parents=True, exist_ok=True)
            case "USER":
                image.user = instruction.words[0]
            case "ENTRYPOINT":
                image.entrypoint = instruction.listed
            case "CMD":
                image.command = instruction.listed
            case "HEALTHCHECK":
                image.health = instruction.listed
            case "LABEL" | "EXPOSE" | "VOLUME":
                pass
            case unknown:
                sys.exit(f"docker/check.py does not know {unknown}")


def _copy(words: list[str], image: Image, images: dict[str, Image]) -> None:
    if words[0].startswith("--from="):
        source = images[words[0].removeprefix("--from=")]
        subprocess.run(["cp", "--archive", f"{source.place(words[1])}/.", image.place(words[2])], check=True)
        return
    for path in copied_files(ROOT, words[0]):
        target = image.place(words[1]) / (path if words[0] == "." else path.relative_to(words[0]))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, target)


#: Makes the root read-only and /tmp empty, then becomes the command, which is process 1 of its namespace.
_CONTAINED = """
root=$1 user=$2 work=$3; shift 3
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
for place in $WRITABLE; do mount --bind "$place" "$root/var/lib/$(basename "$place")"; done
mount -o remount,bind,ro "$root"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
exec chroot --userspec="$user" --groups="${user#*:}" "$root" /usr/bin/env -u WRITABLE -C "$work" "$@"
"""


class Container:
    """A process of an image, contained; it is ended with the block."""

    def __init__(
        self, image: Image, arguments: list[str], settings: dict[str, str], log: Path, volume: Path | None = None
    ) -> None:
        self.name = " ".join(arguments) or image.root.name
        self.log = log
        self._image = image
        self._environment = {**image.environment, **settings, "WRITABLE": str(volume or "")}
        self.process = self._start([*image.entrypoint, *(arguments or image.command)], log)

    def _start(self, command: list[str], log: Path) -> subprocess.Popen[bytes]:
        image = self._image
        with log.open("ab") as output:
            return subprocess.Popen(
                ["unshare", "--mount", "--pid", "--fork", "sh", "-euc", _CONTAINED, "sh",
                 str(image.root), image.user, image.work_directory, *command],
                env=self._environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip

    def __enter__(self) -> Container:
        return self

    def __exit__(self, *_error: object) -> None:
        self._signal(signal.SIGKILL)
        self.process.wait()

    def _signal(self, number: signal.Signals) -> None:
        """Signal process 1 of the namespace, with which all others in it end."""
        if self.process.poll() is None:
            for child in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
                os.kill(int(child), number)

    def healthy(self) -> bool:
        """Run the image's health check beside the process."""
        with self._start(self._image.health, self.log.with_suffix(".health.log")) as check:
            return check.wait() == 0

    def wait_until_healthy(self) -> None:
        until = time.monotonic() + START_LIMIT_SECONDS
        while not self.healthy() or self.process.poll() is not None:
            if self.process.poll() is not None or time.monotonic() > until:
                sys.exit(f"{self.name} does not answer:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.2)

    def end(self) -> float:
        """Send SIGTERM to process 1 and return how many seconds it took to end."""
        began = time.monotonic()
        self._signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            sys.exit(f"{self.name} has not ended {STOP_LIMIT_SECONDS} s after SIGTERM")
        return time.monotonic() - began

    def succeed(self) -> None:
        """Wait for the end of a process that has one."""
        if self.process.wait():
            sys.exit(f"{self.name} ended with status {self.process.returncode}:\n{self.log.read_text()[-3000:]}")


def use(images: dict[str, Image], directory: Path) -> None:
    """Run every process type and send a mail through them.

    Raises:
        SystemExit: Something does not do what it should.
    """
    product = images["mailfleet"]
    with ExitStack() as stack:
        for left in directory.glob("*.log"):
            left.unlink()
        volume = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=directory))) / "simulator"
        volume.mkdir()
        os.chown(volume, *map(int, images["simulator"].user.split(":")))
        simulator = stack.enter_context(Container(images["simulator"], [], {}, directory / "simulator.log", volume))
        simulator.wait_until_healthy()
        settings = _settings(product, volume)
        with Container(product, ["release"], settings, directory / "release.log") as release:
            release.succeed()
        fleet = [
            stack.enter_context(
                Container(product, [name], {**settings, "METRICS_PORT": str(9700 + number)}, directory / f"{name}.log")
            )
            for number, name in enumerate(_process_types())
        ]
        for container in fleet:
            container.wait_until_healthy()
        _send(product, settings, directory)
        for container in [*fleet, simulator]:
            print(f"{container.name}: ended {container.end():.1f} s after SIGTERM", flush=True)


def _free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def _process_types() -> Iterator[str]:
    for line in (ROOT / "Procfile").read_text().splitlines():
        name = line.partition(":")[0]
        if name != "release":
            yield name


def _settings(product: Image, volume: Path) -> dict[str, str]:
    servers = {name: os.environ.get(name) for name in ("DATABASE_URL", "RABBITMQ_URL", "REDIS_URL")}
    if missing := [name for name, value in servers.items() if not value]:
        sys.exit(f"docker/check.py needs {', '.join(missing)}: python -m sandbox.servers -- python3 docker/check.py")
    # Where every process of the image can read it.
    authority = product.root / "etc/simulator-ca.pem"
    shutil.copy(volume / "ca.pem", authority)
    authority.chmod(0o644)
    return {
        **{name: value for name, value in servers.items() if value},
        "PORT": _free_port(),
        "GRAPH_BASE_URL": "https://localhost:8443/v1.0",
        "GRAPH_AUTHORITY": "https://localhost:8443",
        "GRAPH_TENANT_ID": "contoso.example",
        "GRAPH_CLIENT_ID": "mailfleet-demo",
        "GRAPH_CLIENT_SECRET": "demo-secret",
        "REQUESTS_CA_BUNDLE": "/etc/simulator-ca.pem",
        "BACKUP_KEYS": f"check:{base64.b64encode(secrets.token_bytes(32)).decode()}",
        "BACKUP_DELAY_SECONDS": "1",
        "NO_PROXY": "localhost,127.0.0.1",
    }


def _send(product: Image, settings: dict[str, str], directory: Path) -> None:
    """Publish a mail with the image's own command line and wait until it is sent and archived."""
    mail = {
        "publisher_message_id": f"check-{secrets.token_hex(4)}",
        "from": "billing@contoso.com",
        "to": ["ann@example.com"],
        "subject": "From the image",
        "body": {"contentType": "text", "content": "Sent by a process in a read-only root."},
    }
    command_line = Image(product.root, product.environment)
    command_line.user, command_line.work_directory = product.user, product.work_directory
    command_line.entrypoint = ["mailfleet"]
    path = product.root / "etc/check-mail.json"
    path.write_text(json.dumps(mail))
    with Container(command_line, ["publish", "/etc/check-mail.json"], settings, directory / "publish.log") as publish:
        publish.succeed()
    until = time.monotonic() + START_LIMIT_SECONDS
    while time.monotonic() < until:
        log = directory / "status.log"
        log.unlink(missing_ok=True)
        with Container(command_line, ["status", mail["publisher_message_id"], "--json"], settings, log) as status:
            status.process.wait()
        if status.process.returncode == 0 and json.loads(log.read_text())["backups"]:
            print("a mail was sent and archived", flush=True)
            return
        time.sleep(0.5)
    sys.exit(f"the mail was not archived within {START_LIMIT_SECONDS} s:\n{log.read_text()}")


def main() -> None:
    """Build the images and use them; the exit status says whether all went well."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--extras", default="", help="the build argument EXTRAS")
    parser.add_argument("--keep", type=Path, help="where to leave the images and logs; the bare Debian in it is used")
    parser.add_argument("--again", action="store_true", help="use the images that --keep has left, without a build")
    options = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("docker/check.py needs root, for chroot and mount")
    with ExitStack() as stack:
        directory = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mailfleet-images-")))
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(0o755)
        dockerfile = Dockerfile.read(ROOT / "docker" / "Dockerfile")
        images = built(dockerfile, directory) if options.again else build(dockerfile, directory, options.extras)
        use(images, directory)
    print("the images do what they should")


if __name__ == "__main__":
    main()
