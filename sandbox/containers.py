"""The same three servers as containers, for a machine that has an engine but not the programs."""

import secrets
import shutil
import subprocess
from pathlib import Path
from typing import ClassVar

from sandbox.processes import Guard, free_port
from sandbox.programs import Program, ServerFailed, write_privately

COMPOSE_FILE = Path(__file__).parents[1] / "docker" / "servers.compose.yaml"


class Project:
    """One sandbox's containers: apart from those of any other, and removed with their data by the guard."""

    def __init__(self, directory: Path, guard: Guard) -> None:
        self.credentials = {
            f"{service.upper()}_{item}": value
            for service in ("postgresql", "rabbitmq", "redis")
            for item, value in (("PORT", str(free_port())), ("PASSWORD", secrets.token_hex(16)))
        }
        environment_file = directory / "compose.env"
        write_privately(environment_file, "".join(f"{name}={value}\n" for name, value in self.credentials.items()))
        self._compose = [
            "docker", "compose", f"--file={COMPOSE_FILE}", f"--env-file={environment_file}",
            f"--project-name=mailfleet-{secrets.token_hex(4)}",
        ]  # fmt: skip
        guard.run([*self._compose, "down", "--volumes", "--timeout=0"])

    @staticmethod
    def available() -> bool:
        """Whether Compose is installed and an engine answers it."""
        return bool(shutil.which("docker")) and all(
            subprocess.run(["docker", *words], capture_output=True, check=False).returncode == 0
            for words in (["compose", "version"], ["info"])
        )

    def compose(self, *arguments: str) -> None:
        finished = subprocess.run([*self._compose, *arguments], capture_output=True, text=True, check=False)
        if finished.returncode:
            raise ServerFailed(f"docker compose {' '.join(arguments)} failed\n{finished.stderr[-2000:]}")


class Container:
    """One server of a project; `Program` says what each verb means. What is particular to one program is not here."""

    ours: ClassVar[bool] = True
    URLS: ClassVar[dict[str, str]] = {
        "postgresql": "postgresql://mailfleet:{password}@127.0.0.1:{port}/mailfleet",
        "rabbitmq": "amqp://mailfleet:{password}@127.0.0.1:{port}/%2F",
        "redis": "redis://:{password}@127.0.0.1:{port}/0",
    }

    def __init__(self, kind: type[Program], project: Project) -> None:
        self.name = kind.name
        self.variable = kind.variable
        self._project = project
        prefix = kind.name.upper()
        self.url = self.URLS[kind.name].format(
            port=project.credentials[f"{prefix}_PORT"], password=project.credentials[f"{prefix}_PASSWORD"]
        )

    def start(self) -> None:
        self._project.compose("up", "--detach", "--wait", self.name)

    def stop(self) -> None:
        self._project.compose("stop", self.name)

    def kill(self) -> None:
        self._project.compose("kill", self.name)

    def suspend(self) -> None:
        self._project.compose("pause", self.name)

    def resume(self) -> None:
        self._project.compose("unpause", self.name)

    def wipe(self) -> None:
        """Put a new container in its place, without the data of this one."""
        self._project.compose("rm", "--stop", "--force", "--volumes", self.name)
        self.start()
