"""The console's HTTP: health, readiness, metrics, and the management API."""

from __future__ import annotations

from fastapi import Depends, FastAPI, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

import contracts
import operations
from console import api_docs, attachments_api, backups_api, dead_letters_api, emails_api, limits_api
from console.access import Access
from console.attachments_api import PATIENCE, Patience
from console.fleet_metrics import FleetCollector
from console.problems import answer_problems
from console.readiness import Readiness

_LOOKING = ["GET", "HEAD"]


def make_app(access: Access, patience: Patience = PATIENCE) -> FastAPI:
    """Return the console for those that ``access`` lets in; with those that store a file it has so much patience."""
    app = FastAPI(
        title="mailfleet",
        version=contracts.__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    app.state.access = access
    app.state.patience = patience
    answer_problems(app)
    app.include_router(api_docs.router)
    app.include_router(emails_api.router)
    app.include_router(dead_letters_api.router)
    app.include_router(limits_api.limits_router)
    app.include_router(limits_api.pauses_router)
    app.include_router(backups_api.router)
    app.include_router(attachments_api.router)
    registry = CollectorRegistry()
    registry.register(FleetCollector())
    readiness = Readiness(operations.ready)

    @app.api_route("/healthz", methods=_LOOKING, include_in_schema=False)
    async def healthz() -> dict[str, str]:
        """Say that the process lives, however many wait for other answers. Open to all: it tells nothing else."""
        return {"status": "alive"}

    @app.api_route("/readyz", methods=_LOOKING, include_in_schema=False)
    async def readyz() -> JSONResponse:
        """Say whether the servers answer. Open to all: it names no address and no secret."""
        findings = await readiness.findings()
        body = {finding.subject: "ok" if finding.fine else "away" for finding in findings}
        return JSONResponse(body, 200 if all(finding.fine for finding in findings) else 503)

    # An annotation could not name ``access``: FastAPI reads annotations outside of this function.
    @app.api_route("/metrics", methods=_LOOKING, dependencies=[Depends(access.viewer)], include_in_schema=False)
    def metrics() -> Response:
        """Return the fleet-wide gauges in Prometheus's text format, as far as the servers answer."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return app
