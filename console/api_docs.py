"""The API's schema, and a page that shows it: from this process alone, so that nobody else learns of a look at it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, Request, Response

from console.access import Viewer
from console.api import PREFIX, private

router = APIRouter(prefix=PREFIX, include_in_schema=False)

_HERE = Path(__file__).parent
_PAGE = (_HERE / "api_docs.html").read_bytes()
_SCRIPT = (_HERE / "api_docs.js").read_bytes()
#: The page may load its script and ask this process, and nothing else.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; connect-src 'self';"
    " frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)


@router.get("/openapi.json", dependencies=[Depends(private)])
def schema(_who: Viewer, request: Request) -> dict[str, Any]:
    """Return what the API can do, as OpenAPI."""
    told: dict[str, Any] = request.app.openapi()
    return told


@router.get("/docs")
async def page() -> Response:
    """Return the page. Open to all: it tells nothing before it is given a token, which it keeps until it is left."""
    return _public(_PAGE, "text/html; charset=utf-8")


@router.get("/docs.js")
async def script() -> Response:
    return _public(_SCRIPT, "text/javascript; charset=utf-8")


def _public(content: bytes, media_type: str) -> Response:
    headers = {
        "Content-Security-Policy": _POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
    return Response(content, media_type=media_type, headers=headers)
