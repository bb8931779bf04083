"""Lets requests-mock answer what the Graph client asks, which goes past requests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast

import pytest
import requests

from graph_client.exchange import Answer
from graph_client.transport import Transport


class MockedAnswer:
    """What an `Answer` is, of an answer that requests-mock has given."""

    def __init__(self, response: requests.Response) -> None:
        self.status = response.status_code
        self.headers = {name.lower(): value for name, value in response.headers.items()}
        self._response = response

    def pieces(self) -> Iterator[bytes]:
        yield from self._response.iter_content(64 * 1024)

    def close(self) -> None:
        self._response.close()


@pytest.fixture
def mocked(monkeypatch: pytest.MonkeyPatch) -> None:
    def exchange(
        _transport: Transport, method: str, _origin: str, url: str, headers: Mapping[str, str], body: bytes | None
    ) -> Answer:
        answer = requests.request(method, url, headers=headers, data=body, stream=True, allow_redirects=False)
        return cast(Answer, MockedAnswer(answer))

    monkeypatch.setattr(Transport, "_exchange", exchange)
