"""What a team writes first: a Celery task that inserts a row, posts ``sendMail``, and updates the row.

It has no ids, no limiter, no archive and no events, it is acknowledged before it is begun, and what became of a lost
answer it does not know. It is what the pipeline's cost is measured against (`bench.pipeline`), so nothing in it is
slower than it has to be: a session per process, plain SQL, no results, Celery's own defaults otherwise. Attachments go
inline, whole and in base64, as Graph takes them up to 3 MB.

    celery --app bench.naive worker --concurrency 2
"""

from __future__ import annotations

import base64
import os
from functools import cache
from typing import Any

import orjson
import psycopg2
import requests
from celery import Celery

TABLE = """
    CREATE TABLE IF NOT EXISTS naive_emails (
        id bigserial PRIMARY KEY, payload json NOT NULL, status text NOT NULL, sent_at timestamptz
    )
"""
_INSERT = "INSERT INTO naive_emails (payload, status) VALUES (%s, 'received') RETURNING id"
_UPDATE = "UPDATE naive_emails SET status = 'sent', sent_at = now() WHERE id = %s"

app = Celery("naive", broker=os.environ.get("RABBITMQ_URL"))
app.conf.task_ignore_result = True
# It logs nothing of a mail, and asks nobody else on the network how he is.
app.conf.worker_hijack_root_logger = False


@app.task(name="naive.send")
def send(email: dict[str, Any]) -> None:
    """Send one ``SendEmail``."""
    with _database() as connection, connection.cursor() as cursor:
        cursor.execute(_INSERT, (orjson.dumps(email).decode(),))
        row = cursor.fetchone()
    message: dict[str, Any] = {
        "subject": email["subject"],
        "body": email["body"],
        "toRecipients": [{"emailAddress": {"address": address}} for address in email["to"]],
    }
    if files := email.get("attachments"):
        message["attachments"] = [_attachment(file) for file in files]
    url = f"{os.environ['GRAPH_BASE_URL']}/users/{email['from']}/sendMail"
    _graph().post(url, json={"message": message}, timeout=30).raise_for_status()
    with _database() as connection, connection.cursor() as cursor:
        cursor.execute(_UPDATE, row)


def _attachment(file: dict[str, Any]) -> dict[str, Any]:
    """Fetch a file whole, to go inline with the mail."""
    answer = _files().get(file["urlOrId"], timeout=30)
    answer.raise_for_status()
    return {
        "@odata.type": "#microsoft.graph.fileAttachment",
        "name": file["name"],
        "contentBytes": base64.b64encode(answer.content).decode(),
    }


@cache
def _database() -> Any:
    return psycopg2.connect(os.environ["DATABASE_URL"])


@cache
def _files() -> requests.Session:
    return requests.Session()  # Graph's token is not for whoever has the files


@cache
def _graph() -> requests.Session:
    answer = requests.post(
        f"{os.environ['GRAPH_AUTHORITY']}/{os.environ['GRAPH_TENANT_ID']}/oauth2/v2.0/token",
        data={
            "client_id": os.environ["GRAPH_CLIENT_ID"],
            "client_secret": os.environ["GRAPH_CLIENT_SECRET"],
            "grant_type": "client_credentials",
            "scope": "https://graph.microsoft.com/.default",
        },
        timeout=30,
    )
    answer.raise_for_status()
    session = requests.Session()
    session.headers["Authorization"] = f"Bearer {answer.json()['access_token']}"
    return session
