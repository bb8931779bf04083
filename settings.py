"""Every setting of mailfleet, read from the environment once and checked as a whole.

This and `settings_sources` are all that reads the environment, so the table in ``docs/settings.md`` (made by
``python -m settings``) is complete by construction. A wrong start is refused with every problem listed
at once: an operator mends a deployment in one go instead of one restart per mistake.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from datetime import date, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

import settings_sources
from addresses import https, on_loopback, postgresql, server, webhook, without_credentials
from bounds import CONCURRENCY_BOUNDS, COUNT_BOUNDS, REQUESTS_BOUNDS, UPLOAD_MB_BOUNDS
from mail_rules import RecipientFirewall, SenderRule
from settings_sources import is_needed, secret_in_file, variable_of
from settings_sources import setting as _setting

#: A worker must notice a lost lease before it may call Graph again: a lease outlives the longest call by this much.
LEASE_MARGIN = timedelta(seconds=15)


class SettingsInvalid(Exception):
    """Raised when the environment is not fit to start with; ``problems`` has one sentence per variable."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("The settings are not usable:\n" + "\n".join(f"  - {problem}" for problem in problems))


#: Longer than anything here should take; it also keeps instants within what PostgreSQL and Python can hold.
_LONGEST = timedelta(days=36_500)


def _of(unit: timedelta) -> BeforeValidator:
    """Read a number of units as a duration."""

    def read(value: Any) -> Any:
        if not isinstance(value, str | int | float):
            return value
        try:
            number = float(value)
        except ValueError:
            raise ValueError("must be a number") from None
        if not 0 < number <= _LONGEST / unit:
            raise ValueError(f"must be more than 0 and at most {_LONGEST / unit:g}")
        return number * unit

    return BeforeValidator(read)


def comma_separated(value: Any) -> Any:
    """Return the parts of a text that are not empty, and whatever else is given as it is.

    Raises:
        ValueError: There is a text and no part: what was meant to restrict something would restrict nothing.
    """
    if not isinstance(value, str):
        return value
    parts = tuple(part.strip() for part in value.split(",") if part.strip())
    if value and not parts:
        raise ValueError("has commas or spaces and nothing between them")
    return parts


def _all_without_credentials(urls: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(map(without_credentials, urls))


def _readable(path: Path) -> Path:
    try:
        path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise ValueError("names a file that cannot be read") from None
    return path


Seconds = Annotated[timedelta, _of(timedelta(seconds=1))]
Hours = Annotated[timedelta, _of(timedelta(hours=1))]
Days = Annotated[timedelta, _of(timedelta(days=1))]
#: At least one of something must be possible.
Count = Annotated[int, Field(ge=1)]
Port = Annotated[int, Field(ge=0, le=65_535)]


Concurrency = Annotated[int, AfterValidator(CONCURRENCY_BOUNDS.check)]
Requests = Annotated[int, AfterValidator(REQUESTS_BOUNDS.check)]
Megabytes = Annotated[int, AfterValidator(UPLOAD_MB_BOUNDS.check)]
Limit = Annotated[int, AfterValidator(COUNT_BOUNDS.check)]
PublicAddress = Annotated[str, AfterValidator(https), AfterValidator(without_credentials)]
Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(comma_separated)]


class Settings(settings_sources.StoreSettings):
    """The effective settings of a process; durations are `timedelta`."""

    model_config = SettingsConfigDict(extra="ignore", env_ignore_empty=True, hide_input_in_errors=True, frozen=True)

    database_url: Annotated[SecretStr, server("postgresql", "postgres"), AfterValidator(postgresql)] = _setting(
        "DATABASE_URL", "PostgreSQL, `postgresql://user:password@host:port/name`."
    )
    database_pooled: bool = _setting(
        "DATABASE_POOLED",
        "Whether `DATABASE_URL` leads to a pooler in transaction mode, such as PgBouncer (docs/deploy.md).",
        default=False,
    )
    rabbitmq_url: Annotated[SecretStr, server("amqp", "amqps")] = _setting(
        "RABBITMQ_URL", "RabbitMQ, `amqp://user:password@host:port/vhost`."
    )
    rabbitmq_queue_type: Literal["quorum", "classic"] = _setting(
        "RABBITMQ_QUEUE_TYPE",
        "Type of every queue that mailfleet declares. It cannot be changed once the queues exist.",
        default="quorum",
    )
    redis_url: Annotated[SecretStr, server("redis", "rediss")] = _setting(
        "REDIS_URL", "Redis, `redis://:password@host:port/0`."
    )

    graph_base_url: PublicAddress = _setting(
        "GRAPH_BASE_URL",
        "Microsoft Graph. Must be https except on loopback.",
        default="https://graph.microsoft.com/v1.0",
    )
    graph_authority: PublicAddress = _setting(
        "GRAPH_AUTHORITY",
        "Where tokens come from; the tenant is appended. Must be https except on loopback.",
        default="https://login.microsoftonline.com",
    )
    graph_tenant_id: str = _setting("GRAPH_TENANT_ID", "The Entra tenant, as id or domain.")
    graph_client_id: str = _setting("GRAPH_CLIENT_ID", "The app registration's client id.")
    graph_client_secret: SecretStr | None = _setting(
        "GRAPH_CLIENT_SECRET", "The app registration's secret. Either this or a certificate.", default=None
    )
    graph_client_certificate: Annotated[Path, AfterValidator(_readable)] | None = _setting(
        "GRAPH_CLIENT_CERTIFICATE",
        "Path of a PEM file with the app registration's private key and certificate.",
        default=None,
    )
    graph_client_secret_expires_on: date | None = _setting(
        "GRAPH_CLIENT_SECRET_EXPIRES_ON",
        "Day on which the secret ends, as `2027-01-31`: `mailfleet doctor` and a metric tell of it before.",
        default=None,
    )
    graph_timeout: Seconds = _setting(
        "GRAPH_TIMEOUT_SECONDS", "Longest wait for one answer of Graph.", default=30, unit="seconds"
    )

    send_plain_concurrency: Count = _setting(
        "SEND_PLAIN_CONCURRENCY", "Mails without attachments in flight, whole fleet.", default=64, unit="emails"
    )
    send_attached_concurrency: Count = _setting(
        "SEND_ATTACHED_CONCURRENCY", "Mails with attachments in flight, whole fleet.", default=16, unit="emails"
    )
    backup_concurrency: Count = _setting(
        "BACKUP_CONCURRENCY", "Backups in flight, whole fleet.", default=32, unit="emails"
    )

    mailbox_concurrency: Concurrency = _setting(
        "MAILBOX_CONCURRENCY", "Requests to Graph at a time per mailbox. 0: no limit.", default=4, unit="requests"
    )
    mailbox_requests_per_10_minutes: Requests = _setting(
        "MAILBOX_REQUESTS_PER_10_MINUTES",
        "Requests to Graph per mailbox. 0: no limit.",
        default=10_000,
        unit="requests",
    )
    mailbox_upload_mb_per_5_minutes: Megabytes = _setting(
        "MAILBOX_UPLOAD_MB_PER_5_MINUTES", "Bytes sent to Graph per mailbox. 0: no limit.", default=150, unit="MB"
    )
    mailbox_sends_per_minute: Limit = _setting(
        "MAILBOX_SENDS_PER_MINUTE", "Mails per mailbox. 0: no limit.", default=30, unit="emails"
    )
    mailbox_recipients_per_day: Limit = _setting(
        "MAILBOX_RECIPIENTS_PER_DAY",
        "Recipients per mailbox in 24 hours. 0: no limit.",
        default=10_000,
        unit="recipients",
    )
    tenant_requests_per_10_seconds: Requests = _setting(
        "TENANT_REQUESTS_PER_10_SECONDS",
        "Requests to Graph, all mailboxes. 0: no limit.",
        default=130_000,
        unit="requests",
    )

    tenant_external_recipients_per_day: Limit = _setting(
        "TENANT_EXTERNAL_RECIPIENTS_PER_DAY",
        "Recipients outside `INTERNAL_DOMAINS` in 24 hours, all mailboxes. 0: no limit.",
        default=0,
        unit="recipients",
    )
    internal_domains: Names = _setting(
        "INTERNAL_DOMAINS",
        "Domains of the organisation, as patterns, comma-separated; a recipient elsewhere is external. Empty: all are.",
        default="",
    )

    max_attempts: Count = _setting(
        "MAX_ATTEMPTS", "Attempts before a mail is dead-lettered.", default=8, unit="attempts"
    )
    retry_backoff_min: Seconds = _setting(
        "RETRY_BACKOFF_MIN_SECONDS", "Upper end of the first wait before another attempt.", default=5, unit="seconds"
    )
    retry_backoff_max: Seconds = _setting(
        "RETRY_BACKOFF_MAX_SECONDS", "Longest wait before another attempt.", default=900, unit="seconds"
    )
    lease: Seconds = _setting(
        "LEASE_SECONDS", "How long a worker owns a mail before another may take it.", default=120, unit="seconds"
    )
    in_doubt_settle: Seconds = _setting(
        "IN_DOUBT_SETTLE_SECONDS", "Wait before a mail in doubt is first looked up.", default=30, unit="seconds"
    )
    in_doubt_grace: Seconds = _setting(
        "IN_DOUBT_GRACE_SECONDS",
        "How long a mail may be absent before it counts as not sent.",
        default=300,
        unit="seconds",
    )
    in_doubt_policy: Literal["resend", "hold"] = _setting(
        "IN_DOUBT_POLICY",
        "What becomes of a mail that stayed absent: sent again, or held for the operator.",
        default="resend",
    )

    send_plain_via: Literal["sendmail", "draft"] = _setting(
        "SEND_PLAIN_VIA",
        "How mail without attachments is sent: at once, or as a draft whose id is known before it is sent.",
        default="sendmail",
    )

    draft_retention: Days = _setting("DRAFT_RETENTION_DAYS", "How long an unsent draft stays.", default=1, unit="days")
    backup_delay: Seconds = _setting(
        "BACKUP_DELAY_SECONDS",
        "Wait between a send and its backup, for Sent Items to fill; half as long more to archive several at once.",
        default=10,
        unit="seconds",
    )
    backup_retention: Days = _setting(
        "BACKUP_RETENTION_DAYS", "How long a backup is kept, as of when it was stored.", default=365, unit="days"
    )
    payload_retention: Days = _setting(
        "PAYLOAD_RETENTION_DAYS",
        "How long the content of a settled mail is kept; its ids stay.",
        default=30,
        unit="days",
    )
    record_retention: Days = _setting(
        "RECORD_RETENTION_DAYS",
        "How long published events, receipts, resolved dead letters and idle rows of mailboxes are kept.",
        default=90,
        unit="days",
    )
    audit_retention: Days = _setting(
        "AUDIT_RETENTION_DAYS", "How long the audit log is kept.", default=730, unit="days"
    )
    seal_payloads: bool = _setting("SEAL_PAYLOADS", "Whether new payloads are encrypted in the database.", default=True)
    backup_keys: SecretStr = _setting(
        "BACKUP_KEYS", "Keys of all that is sealed: `id:base64` pairs, comma-separated, newest first, 32 bytes each."
    )

    attachment_allowed_hosts: Names = _setting(
        "ATTACHMENT_ALLOWED_HOSTS",
        "Hosts that attachments may come from, as `host` or `host:port` patterns, comma-separated; these may have a"
        " private address. Empty: any public host on port 443.",
        default="",
    )
    attachment_cloud_urls: Annotated[Names, AfterValidator(_all_without_credentials)] = _setting(
        "ATTACHMENT_CLOUD_URLS",
        "Where in clouds' object stores attachments may come from: prefixes, as `s3://bucket/folder`, comma-separated.",
        default="",
    )
    attachment_store_url: Annotated[str, AfterValidator(without_credentials)] = _setting(
        "ATTACHMENT_STORE_URL",
        "Where stored attachments are kept, sealed: a folder that console and `send_attached` share, or `s3://…`,"
        " `abfs://…`.",
        default="file:///var/lib/mailfleet/attachments",
    )
    attachment_types: Names = _setting(
        "ATTACHMENT_TYPES", "Content types that are stored, as patterns, comma-separated.", default="*"
    )
    attachment_retention: Days = _setting(
        "ATTACHMENT_RETENTION_DAYS", "How long a stored attachment is kept at most.", default=30, unit="days"
    )
    attachment_keep_used: Hours = _setting(
        "ATTACHMENT_KEEP_USED_HOURS",
        "How long a stored attachment is kept once every mail that uses it is done.",
        default=1,
        unit="hours",
    )
    attachment_max_mb: Count = _setting("ATTACHMENT_MAX_MB", "Largest attachment.", default=150, unit="MB")
    message_max_mb: Count = _setting(
        "MESSAGE_MAX_MB", "Largest mail: its attachments together, as they are.", default=150, unit="MB"
    )
    allowed_senders: Annotated[Names, AfterValidator(SenderRule.check)] = _setting(
        "ALLOWED_SENDERS",
        "Mailboxes that may be sent from, as patterns, comma-separated; `user=pattern`: only by that user of RabbitMQ."
        " Given, it must not be empty.",
        default="*",
    )
    recipient_firewall: Annotated[Names, AfterValidator(RecipientFirewall.check)] = _setting(
        "RECIPIENT_FIREWALL",
        "Not for production: patterns of the recipients that mail may reach, comma-separated; or `redirect:address`,"
        " to which all mail goes, with its recipients in x- headers. It holds for `reply_to` too. Empty: none.",
        default="",
    )

    otlp_endpoint: str | None = _setting(
        "OTEL_EXPORTER_OTLP_ENDPOINT", "Receiver of traces, OTLP over HTTP, as in `http://otel:4318`.", default=None
    )
    otlp_headers: SecretStr | None = _setting(
        "OTEL_EXPORTER_OTLP_HEADERS", "Its headers: `name=value` pairs, comma-separated, percent-encoded.", default=None
    )
    traces_sampled: Annotated[float, Field(ge=0, le=1)] = _setting(
        "TRACES_SAMPLED", "Part of the mails without a `traceparent` of their publisher that is traced.", default=0.01
    )
    console_tokens: SecretStr | None = _setting(
        "CONSOLE_TOKENS",
        "Who may use the console: `name:role:token`, comma-separated; roles are viewer and operator."
        " Without any, the console answers loopback clients only.",
        default=None,
    )
    console_failed_tries_per_minute: Limit = _setting(
        "CONSOLE_FAILED_TRIES_PER_MINUTE",
        "Wrong tokens from one client address before it is refused for a minute. 0: no limit.",
        default=20,
        unit="tries",
    )
    dead_letter_webhook_url: Annotated[SecretStr | None, AfterValidator(webhook)] = _setting(
        "DEAD_LETTER_WEBHOOK_URL",
        "Where new dead letters are told of, by POST, at most once a minute. Must be https except on loopback. Unset:"
        " nowhere.",
        default=None,
    )
    dead_letter_webhook_secret: SecretStr | None = _setting(
        "DEAD_LETTER_WEBHOOK_SECRET",
        "Signs what the webhook is told (standardwebhooks.com): 16 characters or more, or `whsec_` and base64.",
        default=None,
    )
    port: Port = _setting("PORT", "Port of the console.", default=8000)
    metrics_port: Port = _setting("METRICS_PORT", "Port on which a process serves its own metrics. 0: none.", default=0)
    prometheus_multiproc_dir: Path | None = _setting(
        "PROMETHEUS_MULTIPROC_DIR",
        "Where the processes of a worker type add up their metrics; `bin/start` makes one per start.",
        default=None,
    )
    crash_directory: Path | None = _setting(
        "CRASH_DIRECTORY",
        "For tests: a file in it has the process killed at the line of that name. Refused unless Graph is on loopback.",
        default=None,
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = _setting(
        "LOG_LEVEL", "Least severe log line that is written.", default="INFO"
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003  passed by name
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003  passed by name
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        sources = (settings_sources.SecretFiles, settings_sources.StoredSecrets, settings_sources.WithheldSecrets)
        return init_settings, env_settings, *(source(settings_cls) for source in sources)

    @model_validator(mode="after")
    def _fit_together(self) -> Settings:
        if problems := list(self._contradictions()):
            raise ValueError("\n".join(problems))
        return self

    def _contradictions(self) -> Iterator[str]:
        if self.lease < self.graph_timeout + LEASE_MARGIN:
            yield (
                f"LEASE_SECONDS must exceed GRAPH_TIMEOUT_SECONDS by {LEASE_MARGIN.total_seconds():g} or more:"
                " a worker must not lose its mail while Graph is answering"
            )
        if self.retry_backoff_max < self.retry_backoff_min:
            yield "RETRY_BACKOFF_MAX_SECONDS must not be less than RETRY_BACKOFF_MIN_SECONDS"
        if self.in_doubt_grace < self.in_doubt_settle:
            yield "IN_DOUBT_GRACE_SECONDS must not be less than IN_DOUBT_SETTLE_SECONDS"
        if self.crash_directory and not on_loopback(self.graph_base_url):
            yield "CRASH_DIRECTORY is for tests, where Graph is on loopback"

    def shown(self) -> dict[str, str]:
        """Return the effective values by variable, in order of declaration, every secret masked."""
        return {variable_of(field): _shown(getattr(self, name)) for name, field in type(self).model_fields.items()}


def load(checks: Mapping[str, Callable[[str], object]] | None = None) -> Settings:
    """Read the settings from the environment.

    Args:
        checks: For variables whose form others know: each raises ValueError, whose text quotes no secret.

    Raises:
        SettingsInvalid: A value is missing, malformed or contradicts another; all problems are listed.
    """
    settings_sources.withhold()
    settings_sources.forget_stored()
    problems = [*_unreadable_files(), *_unclear_credential(), *_nobody_allowed()]
    if problem := settings_sources.store_problem(Settings):
        # What it would have given is not missing as well.
        raise SettingsInvalid([problem, *problems])
    try:
        settings = Settings()
    except ValidationError as error:
        problems += [problem for details in error.errors() for problem in _sentences(details)]
    told = {problem.partition(":")[0] for problem in problems}
    problems += _failed({variable: check for variable, check in (checks or {}).items() if variable not in told})
    if problems:
        raise SettingsInvalid(problems)
    return settings


def _failed(checks: Mapping[str, Callable[[str], object]]) -> Iterator[str]:
    elsewhere = {**settings_sources.StoredSecrets(Settings)(), **settings_sources.SecretFiles(Settings)()}
    for variable, check in checks.items():
        try:
            if value := os.environ.get(variable) or elsewhere.get(variable):
                check(value)
        except ValueError as problem:
            yield f"{variable}: {problem}"


def _unreadable_files() -> Iterator[str]:
    for field in Settings.model_fields.values():
        if secret_in_file(field) == "":
            yield f"{variable_of(field)}_FILE names a file that cannot be read or is empty"


def _unclear_credential() -> Iterator[str]:
    variables = ("GRAPH_CLIENT_SECRET", "GRAPH_CLIENT_SECRET_FILE"), ("GRAPH_CLIENT_CERTIFICATE",)
    given = sum(any(os.environ.get(name) for name in alternatives) for alternatives in variables)
    stored = "GRAPH_CLIENT_SECRET" in settings_sources.stored_secrets(Settings) and given == 0
    if is_needed("GRAPH_CLIENT_SECRET") and given + stored != 1:
        yield "GRAPH_CLIENT_SECRET or GRAPH_CLIENT_CERTIFICATE: exactly one must be given"


def _nobody_allowed() -> Iterator[str]:
    """Of an empty variable the default counts; here that is everybody, which whoever gives nothing may not mean."""
    if os.environ.get("ALLOWED_SENDERS") == "":
        yield "ALLOWED_SENDERS is empty: leave it out, or give *, to let every mailbox send"


def _sentences(details: Any) -> list[str]:
    if not details["loc"]:
        return str(details["ctx"]["error"]).split("\n")
    variable = details["loc"][0]
    said = details["msg"].removeprefix("Value error, ")
    return [f"{variable} is missing" if details["type"] == "missing" else f"{variable}: {said}"]


def _shown(value: Any) -> str:
    if isinstance(value, SecretStr):
        return "********"
    if isinstance(value, timedelta):
        return f"{value / timedelta(days=1):g} days" if value >= timedelta(days=1) else f"{value.total_seconds():g} s"
    if isinstance(value, tuple):
        return ",".join(value)
    return "" if value is None else str(value)


if __name__ == "__main__":
    from settings_reference import reference

    print(reference(), end="")
