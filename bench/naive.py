"""What one writes first: a loop that consumes, inserts, posts, updates and acknowledges, one email at a time.

It has no ids, no limiter, no archive, no events and no answer to a lost answer; it is the floor that the pipeline is
measured from. It runs in a process of its own, ``python -m bench.naive``, so that it shares no interpreter with the
measurement.
"""

from __future__ import annotations

import argparse
import os
import threading

import orjson
import pika
import psycopg2
import requests

QUEUE = "naive"

_TABLE = "CREATE TABLE naive_emails (id bigserial PRIMARY KEY, payload json, status text, sent_at timestamptz)"
_INSERT = "INSERT INTO naive_emails (payload, status) VALUES (%s, 'received') RETURNING id"
_UPDATE = "UPDATE naive_emails SET status = 'sent', sent_at = now() WHERE id = %s"


def main() -> None:
    """Send what is in the queue with some threads, until ``--emails`` were sent."""
    parser = argparse.ArgumentParser(prog="python -m bench.naive", description=__doc__)
    parser.add_argument("--emails", type=int, required=True)
    parser.add_argument("--threads", type=int, default=8)
    options = parser.parse_args()
    with psycopg2.connect(os.environ["DATABASE_URL"]) as connection:
        connection.cursor().execute(_TABLE)
    connection.close()
    token = _token()
    countdown = _Countdown(options.emails)
    threads = [threading.Thread(target=_send_all, args=(token, countdown)) for _ in range(options.threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class _Countdown:
    def __init__(self, left: int) -> None:
        self._left = left
        self._lock = threading.Lock()

    def one_less(self) -> None:
        with self._lock:
            self._left -= 1

    @property
    def over(self) -> bool:
        return self._left <= 0


def _token() -> str:
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
    return str(answer.json()["access_token"])


def _send_all(token: str, countdown: _Countdown) -> None:
    database = psycopg2.connect(os.environ["DATABASE_URL"])
    graph = requests.Session()
    graph.headers["Authorization"] = f"Bearer {token}"
    broker = pika.BlockingConnection(pika.URLParameters(os.environ["RABBITMQ_URL"]))
    channel = broker.channel()
    channel.basic_qos(prefetch_count=10)
    for method, _, body in channel.consume(QUEUE, inactivity_timeout=0.2):
        if method is not None:
            _send(database, graph, body)
            channel.basic_ack(method.delivery_tag)
            countdown.one_less()
        if countdown.over:
            break
    broker.close()
    database.close()


def _send(database: psycopg2.extensions.connection, graph: requests.Session, body: bytes) -> None:
    email = orjson.loads(body)
    with database, database.cursor() as cursor:
        cursor.execute(_INSERT, (body.decode(),))
        row = cursor.fetchone()
    message = {
        "subject": email["subject"],
        "body": email["body"],
        "toRecipients": [{"emailAddress": {"address": address}} for address in email["to"]],
    }
    url = f"{os.environ['GRAPH_BASE_URL']}/users/{email['from']}/sendMail"
    graph.post(url, json={"message": message}, timeout=30).raise_for_status()
    with database, database.cursor() as cursor:
        cursor.execute(_UPDATE, row)


if __name__ == "__main__":
    main()
