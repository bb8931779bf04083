"""The settings of a fleet that is to run against a simulator of Graph."""

from __future__ import annotations

import base64
import secrets
from urllib.parse import urlsplit

from simulator.control import Simulator


def fleet_settings(simulator: Simulator, **overrides: str | int) -> dict[str, str]:
    """Return the environment that a fleet needs besides its servers: simulated Graph, new archive key."""
    host = urlsplit(simulator.base_url).netloc
    settings = {
        "GRAPH_BASE_URL": simulator.graph_base_url,
        "GRAPH_AUTHORITY": simulator.authority,
        "GRAPH_TENANT_ID": "contoso.example",
        "GRAPH_CLIENT_ID": "mailfleet-demo",
        "GRAPH_CLIENT_SECRET": "demo-secret",
        "REQUESTS_CA_BUNDLE": simulator.ca_bundle,
        "BACKUP_KEYS": f"demo:{base64.b64encode(secrets.token_bytes(32)).decode()}",
        "ATTACHMENT_ALLOWED_HOSTS": host,
        # A proxy that leads out of this machine does not lead back to it.
        "NO_PROXY": "localhost,127.0.0.1",
        "no_proxy": "localhost,127.0.0.1",
    }
    return settings | {name: str(value) for name, value in overrides.items()}
