"""What the tests of the management API share: the console over real HTTP, and people with tokens."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import requests
import uvicorn
from support import wait_until

from console.access import Access
from console.app import make_app
from console_tokens import parse_tokens
from sandbox.processes import free_port

VIEWER, OPERATOR = "a-token-of-the-viewer", "a-token-of-the-operator"
TOKENS = f"grafana:viewer:{VIEWER}, ann:operator:{OPERATOR}"


class Caller:
    """Somebody with a token, or without."""

    def __init__(self, url: str, token: str | None) -> None:
        self.url = url
        self._token = token

    def ask(self, method: str, path: str, **request: Any) -> requests.Response:
        headers = {**request.pop("headers", {})}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        return requests.request(method, f"{self.url}/api/v1{path}", headers=headers, timeout=30, **request)

    def get(self, path: str, **query: Any) -> Any:
        """What is answered with 200."""
        answer = self.ask("GET", path, params=query)
        assert answer.status_code == 200, answer.text
        assert answer.headers["Cache-Control"] == "no-store"
        return answer.json()

    def do(self, method: str, path: str, **body: Any) -> Any:
        """What is answered with 200 to an action."""
        answer = self.ask(method, path, json=body) if method != "DELETE" else self.ask(method, path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def problem(self, method: str, path: str, status: int, **request: Any) -> dict[str, Any]:
        """What is answered if it cannot be done: one shape, whatever it is."""
        answer = self.ask(method, path, **request)
        assert answer.status_code == status, answer.text
        assert answer.headers["Content-Type"] == "application/problem+json"
        problem: dict[str, Any] = answer.json()
        assert (problem["status"], problem["type"]) == (status, "about:blank")
        assert problem["title"]
        assert problem["detail"]
        return problem


@contextmanager
def console(tokens: str = TOKENS) -> Iterator[str]:
    """Serve the console from this process, over HTTP, and return its address."""
    port = free_port()
    settings = uvicorn.Config(
        make_app(Access(parse_tokens(tokens))), port=port, log_config=None, access_log=False, lifespan="off"
    )
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until("the console answers", lambda: server.started)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
