"""A plain client of Graph for the tests of the simulator: it says exactly what it is told to say, nothing better."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import requests

from simulator.control import Simulator

ANN = "ann@example.com"
TAG = "String {66f5a359-4659-4830-9070-00047ec6ac6e} Name Tag"
GRAPH_SCOPE = "https://graph.microsoft.com/.default"


def token_form(**changes: str) -> dict[str, str]:
    return {
        "client_id": "mailfleet-demo",
        "client_secret": "demo-secret",
        "grant_type": "client_credentials",
        "scope": GRAPH_SCOPE,
    } | changes


def recipient(address: str) -> dict[str, Any]:
    return {"emailAddress": {"address": address}}


def message(**changes: Any) -> dict[str, Any]:
    """A message that Graph accepts, with members replaced or, by None, left out."""
    given = {
        "subject": "Hello",
        "body": {"contentType": "text", "content": "Good morning"},
        "toRecipients": [recipient("bob@example.org")],
    } | changes
    return {name: value for name, value in given.items() if value is not None}


def tagged(value: str) -> dict[str, Any]:
    return message(singleValueExtendedProperties=[{"id": TAG, "value": value}])


def tag_filter(value: str, name: str = TAG) -> str:
    return f"singleValueExtendedProperties/Any(ep: ep/id eq '{name}' and ep/value eq '{value}')"


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        pause.wait(0.01)


class GraphClient:
    """Speaks to the simulator with a token of its own; every answer is returned as it came."""

    def __init__(self, simulator: Simulator) -> None:
        self.simulator = simulator
        self.session = requests.Session()
        self.session.trust_env = False
        self.session.verify = simulator.ca_bundle
        self.sign_in()

    def token(self, **changes: str) -> requests.Response:
        url = f"{self.simulator.authority}/contoso/oauth2/v2.0/token"
        return self.session.post(url, data=token_form(**changes), headers={"Authorization": None})

    def sign_in(self) -> None:
        self.session.headers["Authorization"] = f"Bearer {self.token().json()['access_token']}"

    def call(self, method: str, path: str, mailbox: str = ANN, **options: Any) -> requests.Response:
        url = f"{self.simulator.graph_base_url}/users/{mailbox}{path}"
        return self.session.request(method, url, timeout=options.pop("timeout", 10), **options)

    def send(self, given: dict[str, Any] | None = None, mailbox: str = ANN, **options: Any) -> requests.Response:
        return self.call("POST", "/sendMail", mailbox, json={"message": given or message()}, **options)

    def draft(self, given: dict[str, Any] | None = None, **options: Any) -> str:
        created = self.call("POST", "/messages", json=given or message(), **options)
        assert created.status_code == 201, created.text
        return str(created.json()["id"])

    def send_draft(self, draft_id: str) -> requests.Response:
        return self.call("POST", f"/messages/{draft_id}/send")

    def found(self, value: str, folder: str = "", **options: Any) -> list[dict[str, Any]]:
        """The messages that carry this tag."""
        answer = self.call("GET", f"{folder}/messages", params={"$filter": tag_filter(value)}, **options)
        assert answer.status_code == 200, answer.text
        return list(answer.json()["value"])


def code(answer: requests.Response) -> str:
    return str(answer.json()["error"]["code"])
