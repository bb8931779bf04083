"""The console's HTTP: health, readiness, metrics."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, FastAPI, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

import operations
from console.access import Access
from console.fleet_metrics import FleetCollector


def make_app(access: Access) -> FastAPI:
    """Return the console for those that ``access`` lets in."""
    app = FastAPI(title="mailfleet", docs_url=None, redoc_url=None, openapi_url=None)
    registry = CollectorRegistry()
    registry.register(FleetCollector())

    @app.get("/healthz")
    def healthz() -> dict[str, str]:
        """Say that the process lives. Open to all: it tells nothing else."""
        return {"status": "alive"}

    @app.get("/readyz")
    def readyz() -> JSONResponse:
        """Say whether the servers answer. Open to all: it names no address and no secret."""
        findings = operations.ready()
        body = {finding.subject: "ok" if finding.fine else "away" for finding in findings}
        return JSONResponse(body, 200 if all(finding.fine for finding in findings) else 503)

    @app.get("/metrics")
    def metrics(_who: Annotated[str, Depends(access.viewer)]) -> Response:
        """Return the fleet-wide gauges in Prometheus's text format."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return app
