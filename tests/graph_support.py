"""Lets requests-mock answer what the Graph client asks, which goes past requests."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import requests
from urllib3 import BaseHTTPResponse

from graph_client.transport import Transport


@pytest.fixture
def mocked(monkeypatch: pytest.MonkeyPatch) -> None:
    def exchange(
        _transport: Transport, method: str, _origin: str, url: str, headers: Mapping[str, str], body: bytes | None
    ) -> BaseHTTPResponse:
        answer = requests.request(method, url, headers=headers, data=body, stream=True, allow_redirects=False)
        raw: BaseHTTPResponse = answer.raw
        return raw

    monkeypatch.setattr(Transport, "_exchange", exchange)
