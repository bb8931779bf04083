"""The settings: every problem at once, no secret shown anywhere, and a reference that is not out of date."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

import settings
import settings_reference
from settings import Settings, SettingsInvalid, load
from settings_sources import is_secret

ROOT = Path(__file__).resolve().parent.parent
SECRET = "hunter2-hunter2"
KEY = base64.b64encode(b"k" * 32).decode()
COMPLETE = {
    "DATABASE_URL": f"postgresql://mail:{SECRET}@db/mail",
    "RABBITMQ_URL": f"amqp://mail:{SECRET}@mq/",
    "REDIS_URL": f"redis://:{SECRET}@redis/0",
    "GRAPH_TENANT_ID": "contoso.example",
    "GRAPH_CLIENT_ID": "app",
    "GRAPH_CLIENT_SECRET": SECRET,
    "BACKUP_KEYS": f"k1:{KEY}",
    "CONSOLE_TOKENS": f"olga:operator:{SECRET}-{SECRET}",
    "VAULT_TOKEN": SECRET,
    "VAULT_SECRET_ID": SECRET,
    "AZURE_CLIENT_SECRET": SECRET,
    "DEAD_LETTER_WEBHOOK_URL": f"https://hooks.example/{SECRET}",
    "DEAD_LETTER_WEBHOOK_SECRET": f"{SECRET}-{SECRET}",
    "OTEL_EXPORTER_OTLP_HEADERS": f"x-key={SECRET}",
}
VARIABLES = [str(field.validation_alias) for field in Settings.model_fields.values()]
SECRETS = [str(field.validation_alias) for field in Settings.model_fields.values() if is_secret(field)]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A complete environment and nothing else that is read."""
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv(f"{variable}_FILE", raising=False)
    for variable, value in COMPLETE.items():
        monkeypatch.setenv(variable, value)
    return monkeypatch


def problems() -> list[str]:
    with pytest.raises(SettingsInvalid) as invalid:
        load()
    return invalid.value.problems


def test_a_complete_environment_is_read_with_its_defaults() -> None:
    loaded = load()
    assert loaded.graph_base_url == "https://graph.microsoft.com/v1.0"
    assert (loaded.lease, loaded.backup_retention) == (timedelta(minutes=2), timedelta(days=365))
    assert (loaded.mailbox_concurrency, loaded.allowed_senders, loaded.attachment_allowed_hosts) == (4, ("*",), ())
    assert loaded.database_url.get_secret_value() == COMPLETE["DATABASE_URL"]


def test_every_problem_is_told_at_once_with_its_variable(environment: pytest.MonkeyPatch) -> None:
    # Given
    environment.delenv("DATABASE_URL")
    environment.delenv("GRAPH_CLIENT_SECRET")
    environment.setenv("MAILBOX_CONCURRENCY", "many")
    environment.setenv("MAILBOX_SENDS_PER_MINUTE", "-1")
    environment.setenv("IN_DOUBT_POLICY", "guess")
    environment.setenv("LEASE_SECONDS", "0")
    environment.setenv("REDIS_URL_FILE", "/no/such/file")
    # When
    found = problems()
    # Then
    for variable in (
        "DATABASE_URL is missing",
        "GRAPH_CLIENT_SECRET or GRAPH_CLIENT_CERTIFICATE",
        "MAILBOX_CONCURRENCY",
        "MAILBOX_SENDS_PER_MINUTE",
        "IN_DOUBT_POLICY",
        "LEASE_SECONDS",
        "REDIS_URL_FILE",
    ):
        assert any(variable in problem for problem in found), variable
    assert len(found) == 7


def test_an_empty_variable_is_a_missing_one(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("GRAPH_TENANT_ID", "")
    environment.setenv("MAX_ATTEMPTS", "")
    assert problems() == ["GRAPH_TENANT_ID is missing"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"GRAPH_BASE_URL": "http://graph.microsoft.com/v1.0"}, "GRAPH_BASE_URL: must be an https address"),
        ({"GRAPH_AUTHORITY": "http://login.example"}, "GRAPH_AUTHORITY: must be an https address"),
        ({"LEASE_SECONDS": "40", "GRAPH_TIMEOUT_SECONDS": "30"}, "LEASE_SECONDS must exceed GRAPH_TIMEOUT_SECONDS"),
        ({"RETRY_BACKOFF_MIN_SECONDS": "1000"}, "RETRY_BACKOFF_MAX_SECONDS must not be less"),
        ({"IN_DOUBT_GRACE_SECONDS": "10"}, "IN_DOUBT_GRACE_SECONDS must not be less"),
        ({"MAX_ATTEMPTS": "0"}, "MAX_ATTEMPTS: Input should be greater than or equal to 1"),
        ({"SEND_PLAIN_CONCURRENCY": "0"}, "SEND_PLAIN_CONCURRENCY: Input should be greater than or equal to 1"),
        ({"METRICS_PORT": "99999"}, "METRICS_PORT: Input should be less than or equal to 65535"),
        ({"LEASE_SECONDS": "inf"}, "LEASE_SECONDS: must be more than 0 and at most"),
        ({"LEASE_SECONDS": "nan"}, "LEASE_SECONDS: must be more than 0 and at most"),
        ({"BACKUP_RETENTION_DAYS": "a year"}, "BACKUP_RETENTION_DAYS: must be a number"),
        ({"DATABASE_URL": "postgresql://u:pa/ss@h/x"}, "DATABASE_URL: must look like postgresql://"),
        ({"RABBITMQ_URL": "nonsense"}, "RABBITMQ_URL: must look like amqp://"),
        ({"REDIS_URL": "http://h/0"}, "REDIS_URL: must look like redis://"),
        (
            {"CRASH_DIRECTORY": "/x", "GRAPH_BASE_URL": "https://graph.microsoft.com/v1.0"},
            "CRASH_DIRECTORY is for tests",
        ),
        ({"GRAPH_CLIENT_CERTIFICATE": str(ROOT / "LICENSE")}, "exactly one must be given"),
        ({"GRAPH_BASE_URL": "https://host:x"}, "GRAPH_BASE_URL: must be an https address"),
        ({"DATABASE_URL": "postgresql://u:p@h/x?connect_timeout=5"}, "DATABASE_URL: connect_timeout may not be given"),
        ({"DATABASE_URL": "postgresql://u:p@h/x?application_name=a"}, "DATABASE_URL: application_name may not be"),
        ({"DATABASE_URL": "postgresql://u:p@h/x?colour=red"}, "DATABASE_URL: has something in its query"),
        ({"RABBITMQ_QUEUE_TYPE": "stream"}, "RABBITMQ_QUEUE_TYPE"),
        ({"ALLOWED_SENDERS": "*@example.com, crm="}, "ALLOWED_SENDERS: entry 2 must be pattern or user=pattern"),
        ({"RECIPIENT_FIREWALL": "redirect:qa"}, "RECIPIENT_FIREWALL: redirect:address must name one address"),
        ({"RECIPIENT_FIREWALL": "redirect:a@b.example,*@c.example"}, "and nothing else may be given"),
        ({"ALLOWED_SENDERS": ""}, "ALLOWED_SENDERS is empty: leave it out, or give *"),
        ({"ALLOWED_SENDERS": " , "}, "ALLOWED_SENDERS: has commas or spaces and nothing between them"),
        ({"RECIPIENT_FIREWALL": ","}, "RECIPIENT_FIREWALL: has commas or spaces and nothing between them"),
        ({"ATTACHMENT_ALLOWED_HOSTS": ","}, "ATTACHMENT_ALLOWED_HOSTS: has commas or spaces and nothing between them"),
        ({"RECIPIENT_FIREWALL": "*"}, "RECIPIENT_FIREWALL: each pattern must have an @"),
        ({"SECRETS_FROM": "vault://v.example/secret/x", "VAULT_ROLE_ID": "r"}, "exactly one of VAULT_TOKEN"),
        ({"SECRETS_FROM": "https://v.example/secret"}, "SECRETS_FROM: must look like vault://"),
        ({"SECRETS_FROM": "vault+http://v.example/secret/x"}, "plain http is accepted on loopback only"),
        ({"GRAPH_CLIENT_SECRET_EXPIRES_ON": "soon"}, "GRAPH_CLIENT_SECRET_EXPIRES_ON"),
    ],
)
def test_values_that_contradict_each_other_are_refused(
    environment: pytest.MonkeyPatch, changes: dict[str, str], problem: str
) -> None:
    for variable, value in changes.items():
        environment.setenv(variable, value)
    (found,) = problems()
    assert problem in found


def test_a_lease_outlasts_a_call_by_the_margin_or_the_start_is_refused(environment: pytest.MonkeyPatch) -> None:
    shortest = timedelta(seconds=30) + settings.LEASE_MARGIN
    environment.setenv("GRAPH_TIMEOUT_SECONDS", "30")
    environment.setenv("LEASE_SECONDS", str(shortest.total_seconds()))
    assert load().lease == shortest
    environment.setenv("LEASE_SECONDS", str(shortest.total_seconds() - 0.1))
    ended = subprocess.run(
        [sys.executable, "-c", "import runtime"], cwd=ROOT, env=os.environ, capture_output=True, text=True
    )
    assert ended.returncode == 1
    assert "LEASE_SECONDS must exceed GRAPH_TIMEOUT_SECONDS by 15" in ended.stderr


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]"])
def test_plain_http_is_accepted_on_loopback(environment: pytest.MonkeyPatch, host: str) -> None:
    environment.setenv("GRAPH_BASE_URL", f"http://{host}:8080/v1.0")
    assert load().graph_base_url.startswith("http://")


@pytest.mark.parametrize(
    "variable", [name for name in VARIABLES if name.startswith(("MAILBOX_", "TENANT_")) or name == "METRICS_PORT"]
)
def test_zero_switches_a_limit_off(environment: pytest.MonkeyPatch, variable: str) -> None:
    environment.setenv(variable, "0")
    assert load().shown()[variable] == "0"


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("MAILBOX_CONCURRENCY", "1001", "from 1 to 1000"),
        ("MAILBOX_REQUESTS_PER_10_MINUTES", "1", "from 2 to"),
        ("TENANT_REQUESTS_PER_10_SECONDS", "1", "from 2 to"),
        ("MAILBOX_UPLOAD_MB_PER_5_MINUTES", "4", "from 5 to"),
        ("MAILBOX_RECIPIENTS_PER_DAY", "1000000001", "to 1000000000"),
    ],
)
def test_a_limit_that_no_call_fits_into_is_refused(
    environment: pytest.MonkeyPatch, variable: str, value: str, sentence: str
) -> None:
    environment.setenv(variable, value)
    (problem,) = problems()
    assert problem.startswith(f"{variable}: must be 0 (no limit) or ")
    assert sentence in problem


@pytest.mark.parametrize("url", ["http://hooks.example/", "ftp://hooks.example/", "hooks.example/", "https:///"])
def test_a_webhook_is_told_over_https_and_its_address_is_never_shown(environment: pytest.MonkeyPatch, url: str) -> None:
    environment.setenv("DEAD_LETTER_WEBHOOK_URL", url + SECRET)
    (problem,) = problems()
    assert problem == "DEAD_LETTER_WEBHOOK_URL: must be an https address (http is accepted on loopback only)"


def test_lists_are_separated_by_commas(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("ALLOWED_SENDERS", " a@example.com, *@example.org ,,")
    assert load().allowed_senders == ("a@example.com", "*@example.org")


def test_durations_may_have_fractions(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("IN_DOUBT_SETTLE_SECONDS", "0.5")
    assert load().in_doubt_settle == timedelta(milliseconds=500)


# Secrets


@pytest.mark.parametrize("variable", SECRETS)
def test_each_secret_may_be_in_a_file(environment: pytest.MonkeyPatch, tmp_path: Path, variable: str) -> None:
    value = COMPLETE[variable]
    (tmp_path / "secret").write_text(f"{value}\n")
    environment.delenv(variable)
    environment.setenv(f"{variable}_FILE", str(tmp_path / "secret"))
    loaded = {str(field.validation_alias): name for name, field in Settings.model_fields.items()}
    assert getattr(load(), loaded[variable]).get_secret_value() == value


def test_what_is_no_secret_is_not_read_from_a_file(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("1")
    environment.setenv("MAX_ATTEMPTS_FILE", str(tmp_path / "file"))
    assert load().max_attempts == 8


def test_every_secret_is_known_as_one() -> None:
    assert set(SECRETS) == {
        "DATABASE_URL",
        "RABBITMQ_URL",
        "REDIS_URL",
        "GRAPH_CLIENT_SECRET",
        "BACKUP_KEYS",
        "CONSOLE_TOKENS",
        "VAULT_TOKEN",
        "VAULT_SECRET_ID",
        "AZURE_CLIENT_SECRET",
        "DEAD_LETTER_WEBHOOK_URL",
        "DEAD_LETTER_WEBHOOK_SECRET",
        "OTEL_EXPORTER_OTLP_HEADERS",
    }


def test_no_secret_is_shown(environment: pytest.MonkeyPatch) -> None:
    loaded = load()
    for text in (repr(loaded), str(loaded), str(loaded.shown()), repr(vars(loaded))):
        assert SECRET not in text
        assert KEY not in text
    assert set(loaded.shown()) == set(VARIABLES)
    assert {loaded.shown()[variable] for variable in SECRETS} == {"********"}


def test_no_secret_is_in_an_error(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("MAX_ATTEMPTS", "many")
    environment.setenv("RETRY_BACKOFF_MIN_SECONDS", "1000")
    with pytest.raises(SettingsInvalid) as invalid:
        load()
    for text in (str(invalid.value), repr(invalid.value), repr(invalid.value.__context__)):
        assert SECRET not in text
        assert KEY not in text


def test_a_process_with_a_wrong_environment_ends_with_the_problems_and_no_secret(
    environment: pytest.MonkeyPatch,
) -> None:
    environment.setenv("BACKUP_KEYS", f"k1:{SECRET}")
    environment.delenv("GRAPH_CLIENT_ID")
    for expected in ("GRAPH_CLIENT_ID is missing", "BACKUP_KEYS"):
        ended = subprocess.run(
            [sys.executable, "-c", "import runtime"], cwd=ROOT, env=os.environ, capture_output=True, text=True
        )
        assert ended.returncode == 1
        assert expected in ended.stderr
        assert "Traceback" not in ended.stderr
        assert SECRET not in ended.stderr
        environment.setenv("GRAPH_CLIENT_ID", "app")


def test_what_other_parts_would_stumble_over_is_told_at_once_and_without_a_secret(
    environment: pytest.MonkeyPatch,
) -> None:
    environment.setenv("ATTACHMENT_ALLOWED_HOSTS", "files.example, https://x")
    environment.setenv("DATABASE_URL", f"postgresql://mail:{SECRET}@db/mail?connect_timeout=5")
    environment.setenv("RABBITMQ_URL", f"amqp://mail:{SECRET}@mq/?heartbeat=x")
    environment.setenv("REDIS_URL", f"redis://:{SECRET}@redis/0?socket_timeout=x")
    environment.setenv("GRAPH_BASE_URL", "https://host:x")
    environment.setenv("GRAPH_CLIENT_CERTIFICATE", "/no/such/file.pem")
    environment.delenv("GRAPH_CLIENT_SECRET")
    ended = subprocess.run(
        [sys.executable, "-c", "import runtime"], cwd=ROOT, env=os.environ, capture_output=True, text=True
    )
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert SECRET not in ended.stderr
    variables = [line.removeprefix("  - ").partition(":")[0] for line in ended.stderr.splitlines()[1:]]
    assert sorted(variables) == [
        "ATTACHMENT_ALLOWED_HOSTS",
        "DATABASE_URL",
        "GRAPH_BASE_URL",
        "GRAPH_CLIENT_CERTIFICATE",
        "RABBITMQ_URL",
        "REDIS_URL",
    ]


def test_sslmode_and_the_like_may_be_given(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("DATABASE_URL", "postgresql://u:p@h/x?sslmode=require")
    assert load().database_url.get_secret_value().endswith("sslmode=require")


# Documentation


def test_the_reference_is_the_one_that_the_settings_make() -> None:
    documented = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert documented == settings_reference.reference(), "run: python -m settings > docs/settings.md"


def test_the_reference_names_every_variable_and_each_has_a_help() -> None:
    reference = settings_reference.reference()
    assert [variable for variable in VARIABLES if f"| `{variable}` |" not in reference] == []
    assert all(field.description for field in Settings.model_fields.values())
