"""Each process has the secrets that it needs and no other, wherever they come from, and takes over new ones."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import psycopg2
import pytest
from secret_store_fakes import FakeVault
from test_architecture import OPTIONAL_QUEUES, PROCESS_TYPES
from test_settings import COMPLETE, SECRET, VARIABLES

import models
import outbox
import settings_sources
from models import DatabaseAway
from sandbox.world import ROOT
from settings import Settings, SettingsInvalid, load
from settings_sources import NEEDED_BY, Rereading, current_secret

OURS = {name: value for name, value in COMPLETE.items() if not name.startswith(("VAULT", "AZURE"))}
SECRETS = sorted(
    name for name in OURS if name not in {"GRAPH_TENANT_ID", "GRAPH_CLIENT_ID", "OTEL_EXPORTER_OTLP_ENDPOINT"}
)
SERVERS = {"DATABASE_URL", "RABBITMQ_URL", "REDIS_URL"}
GRAPH, KEYS = {"GRAPH_CLIENT_SECRET"}, {"BACKUP_KEYS"}
#: Of each process type, by NEEDED_BY: what says the same elsewhere is compared with it.
NEEDED = {
    process_type: {name for name in SECRETS if process_type in NEEDED_BY.get(name, {process_type})}
    for process_type in PROCESS_TYPES | OPTIONAL_QUEUES
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A complete environment and nothing else that is read."""
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv(f"{variable}_FILE", raising=False)
    for variable, value in OURS.items():
        monkeypatch.setenv(variable, value)
    yield monkeypatch
    settings_sources.forget_stored()


@pytest.fixture
def vault(environment: pytest.MonkeyPatch) -> Iterator[FakeVault]:
    """A store that has every secret, in the place of the environment."""
    fake = FakeVault()
    with fake.running():
        fake.tokens.add("root")
        for variable in SECRETS:
            fake.secrets[variable] = COMPLETE[variable]
            environment.delenv(variable)
        environment.setenv("SECRETS_FROM", fake.address)
        environment.setenv("VAULT_TOKEN", "root")
        yield fake


def value_of(loaded: Settings, variable: str) -> Any:
    (name,) = (name for name, field in Settings.model_fields.items() if settings_sources.variable_of(field) == variable)
    return getattr(loaded, name)


def asked_for(vault: FakeVault) -> set[str]:
    return {path.rpartition("/")[2] for path in vault.asked} & (NEEDED_BY.keys() | SERVERS)


# Who has what


def test_only_process_types_that_there_are_need_secrets() -> None:
    assert set().union(*NEEDED_BY.values()) <= NEEDED.keys()
    assert NEEDED["release"] == {"DATABASE_URL"}
    assert NEEDED["scheduler"] == SERVERS | {"OTEL_EXPORTER_OTLP_HEADERS"}


def test_the_page_on_security_says_who_has_what() -> None:
    told: dict[str, set[str]] = {}
    table = (ROOT / "docs" / "security.md").read_text().partition("| secret | process types that have it |")[2]
    for line in table.partition("\n\n")[0].splitlines()[2:]:
        _, variables, holders, _ = line.split("|")
        types = set(re.findall(r"`(\w+)`", holders))
        told |= dict.fromkeys(
            re.findall(r"`(\w+)`", variables), NEEDED.keys() - types if "every one" in holders else types
        )
    assert told == {"DATABASE_URL": set(NEEDED), **NEEDED_BY}


@pytest.mark.parametrize("process_type", sorted(NEEDED))
def test_a_process_type_asks_the_store_for_the_secrets_that_it_needs_and_no_other(
    vault: FakeVault, environment: pytest.MonkeyPatch, process_type: str
) -> None:
    environment.setenv("PROCESS_TYPE", process_type)
    loaded = load()
    assert asked_for(vault) == NEEDED[process_type]
    held = {name for name in SECRETS if (value := value_of(loaded, name)) and value.get_secret_value()}
    assert held == NEEDED[process_type]


@pytest.mark.parametrize("process_type", sorted(NEEDED))
def test_a_process_type_drops_what_it_does_not_need_from_its_environment(
    environment: pytest.MonkeyPatch, process_type: str
) -> None:
    environment.setenv("PROCESS_TYPE", process_type)
    loaded = load()
    assert {name for name in SECRETS if name in os.environ} == NEEDED[process_type]
    assert SECRET not in str([value_of(loaded, name) for name in SECRETS if name not in NEEDED[process_type]])


def test_the_command_line_has_everything(vault: FakeVault) -> None:
    load()
    assert asked_for(vault) == set(SECRETS)


@pytest.mark.parametrize("process_type", sorted(NEEDED))
def test_bin_start_gives_a_process_the_secrets_that_it_needs_and_no_other(tmp_path: Path, process_type: str) -> None:
    # Given programs that tell their environment in the place of those that would be started
    (tmp_path / "bin").mkdir()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / "bin" / "start").write_text((ROOT / "bin" / "start").read_text())
    for program in ("python", "dramatiq"):
        (tmp_path / ".venv" / "bin" / program).write_text("#!/bin/sh\nexec env\n")
        (tmp_path / ".venv" / "bin" / program).chmod(0o755)
    given = {**dict.fromkeys(SECRETS, "x"), **{f"{name}_FILE": "/x" for name in SECRETS}}
    # When
    told = subprocess.run(
        ["/bin/sh", str(tmp_path / "bin" / "start"), process_type],
        env={"PATH": os.environ["PATH"], "GRAPH_CLIENT_CERTIFICATE": "/x", **given},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    # Then
    names = set(re.findall(r"^(\w+)=", told, re.MULTILINE))
    assert {name for name in SECRETS if name in names} == NEEDED[process_type]
    assert {name for name in SECRETS if f"{name}_FILE" in names} == NEEDED[process_type]
    assert ("GRAPH_CLIENT_CERTIFICATE" in names) == (NEEDED[process_type] >= GRAPH)
    assert f"PROCESS_TYPE={process_type}" in told.splitlines()


@pytest.mark.parametrize("process_type", sorted(NEEDED.keys() - {"release"}))
def test_a_process_can_start_with_its_own_secrets_alone(environment: pytest.MonkeyPatch, process_type: str) -> None:
    environment.setenv("PROCESS_TYPE", process_type)
    for name in set(SECRETS) - NEEDED[process_type]:
        environment.delenv(name)
    ended = subprocess.run(
        [sys.executable, "-c", "import actors, runtime; print(runtime.vault.keyring.ids)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == ("('k1',)\n" if NEEDED[process_type] >= KEYS else "()\n")


# Where they come from


def test_a_variable_and_a_file_come_before_the_store(
    vault: FakeVault, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environment.setenv("REDIS_URL", "redis://variable/0")
    (tmp_path / "url").write_text("amqp://file/\n")
    environment.setenv("RABBITMQ_URL_FILE", str(tmp_path / "url"))
    loaded = load()
    assert loaded.redis_url.get_secret_value() == "redis://variable/0"
    assert loaded.rabbitmq_url.get_secret_value() == "amqp://file/"
    assert loaded.database_url.get_secret_value() == COMPLETE["DATABASE_URL"]


def test_the_stores_own_credential_may_be_in_a_file(
    vault: FakeVault, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("root\n")
    environment.delenv("VAULT_TOKEN")
    environment.setenv("VAULT_TOKEN_FILE", str(tmp_path / "token"))
    assert load().redis_url.get_secret_value() == COMPLETE["REDIS_URL"]


def test_a_token_for_the_store_that_an_agent_renews_in_its_file_costs_no_restart(
    vault: FakeVault, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Given
    (tmp_path / "token").write_text("root\n")
    environment.delenv("VAULT_TOKEN")
    environment.setenv("VAULT_TOKEN_FILE", str(tmp_path / "token"))
    load()
    # When the token ends, and so does Redis's password
    vault.tokens = {"renewed"}
    vault.secrets["REDIS_URL"] = "redis://new/0"
    assert current_secret("REDIS_URL") is None
    (tmp_path / "token").write_text("renewed\n")
    # Then
    assert current_secret("REDIS_URL") == "redis://new/0"


def test_a_certificate_is_not_joined_by_a_secret_of_the_store(
    vault: FakeVault, environment: pytest.MonkeyPatch
) -> None:
    environment.setenv("GRAPH_CLIENT_CERTIFICATE", str(ROOT / "LICENSE"))
    assert load().graph_client_secret is None


def test_a_store_that_is_away_stops_the_start_with_one_sentence_and_no_secret(
    vault: FakeVault, environment: pytest.MonkeyPatch
) -> None:
    environment.setenv("SECRETS_FROM", "vault+http://127.0.0.1:1/kv/x")
    with pytest.raises(SettingsInvalid) as invalid:
        load()
    assert "SECRETS_FROM: Vault does not answer as it should" in str(invalid.value)
    assert "root" not in str(invalid.value)


def test_what_the_store_does_not_have_is_missing(vault: FakeVault) -> None:
    del vault.secrets["REDIS_URL"]
    with pytest.raises(SettingsInvalid) as invalid:
        load()
    assert invalid.value.problems == ["REDIS_URL is missing"]


# New ones


def test_a_secret_is_read_again_from_its_file_and_from_the_store(
    vault: FakeVault, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    load()
    vault.secrets["REDIS_URL"] = "redis://new/0"
    assert current_secret("REDIS_URL") == "redis://new/0"
    environment.setenv("REDIS_URL_FILE", str(tmp_path / "url"))
    assert current_secret("REDIS_URL") is None
    (tmp_path / "url").write_text("redis://file/0")
    assert current_secret("REDIS_URL") == "redis://file/0"
    environment.setenv("REDIS_URL", "redis://variable/0")
    assert current_secret("REDIS_URL") is None


def test_who_is_refused_again_and_again_reads_now_and_then(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    now = [0.0]
    (tmp_path / "url").write_text("redis://file/0")
    environment.delenv("REDIS_URL")
    environment.setenv("REDIS_URL_FILE", str(tmp_path / "url"))
    reread = Rereading("REDIS_URL", clock=lambda: now[0])
    seen = []
    for now[0] in (1.0, 5.0, 6.0, 9.9, 10.0):
        seen.append(reread() is not None)
    assert seen == [False, True, False, False, True]


def test_a_database_password_that_was_changed_costs_no_restart(database: str) -> None:
    # Given a user whose password is in use
    admin = psycopg2.connect(database)
    admin.autocommit = True
    admin.cursor().execute("DROP ROLE IF EXISTS rotated; CREATE ROLE rotated LOGIN PASSWORD 'old'")
    host = database.rpartition("@")[2]
    stored = [f"postgresql://rotated:old@{host}"]
    models.connect(stored[0], "tests", lambda: stored[0])
    assert models.rows("SELECT current_user::text") == [("rotated",)]
    # When it is changed, and a new connection is needed before the store has it
    admin.cursor().execute("ALTER ROLE rotated PASSWORD 'new'")
    models.disconnect()
    with pytest.raises(DatabaseAway):
        models.rows("SELECT 1")
    # And then it has
    stored[0] = f"postgresql://rotated:new@{host}"
    assert models.rows("SELECT current_user::text") == [("rotated",)]
    # Then so it stays
    models.disconnect()
    stored.clear()
    assert models.rows("SELECT 1") == [(1,)]
    models.disconnect()
    admin.cursor().execute("DROP ROLE rotated")
    admin.close()


def test_a_new_password_for_rabbitmq_is_taken_by_the_next_connection(servers: dict[str, str]) -> None:
    url = servers["RABBITMQ_URL"]
    stored = [re.sub(r":[^:@/]+@", ":wrong@", url)]
    parameters = outbox.connection_parameters(stored[0], "tests", lambda: stored[0])
    with pytest.raises(Exception, match="ACCESS_REFUSED"):
        outbox.connect(parameters)
    stored[0] = url
    outbox.connect(parameters).close()


def test_settings_are_shown_without_any_of_it(vault: FakeVault) -> None:
    shown = orjson.dumps(load().shown()).decode()
    assert SECRET not in shown
    assert "root" not in shown
