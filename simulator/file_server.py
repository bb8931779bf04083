"""Serves files of any size and all the ways in which a file's source fails, under ``/files/``.

``bytes`` and ``seed`` say what the file is, ``type`` its media type, ``etag`` its version; what goes wrong is said by
``fail`` (a status, for the first ``times`` requests or always), ``slow`` (bytes per second) and ``truncate`` (bytes
until it breaks off).
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter

from aiohttp import web

from . import files

_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


class FileServer:
    def __init__(self) -> None:
        self._failures: Counter[str] = Counter()

    async def serve(self, request: web.BaseRequest) -> web.StreamResponse:
        query = request.query
        if request.path == "/files/redirect":
            return web.Response(status=302, headers={"Location": query.get("to", "/")})
        try:
            if self._fails(request):
                return web.Response(status=int(query["fail"]))
            if "bytes" not in query or request.method not in ("GET", "HEAD"):
                return web.Response(status=404 if "bytes" not in query else 405)
            return await self._file(request, int(query["bytes"]))
        except ValueError:
            return web.Response(status=400, text="A number was expected.")

    def _fails(self, request: web.BaseRequest) -> bool:
        if "fail" not in request.query:
            return False
        self._failures[request.path_qs] += 1
        return "times" not in request.query or self._failures[request.path_qs] <= int(request.query["times"])

    async def _file(self, request: web.BaseRequest, size_bytes: int) -> web.StreamResponse:
        wanted = _range(request, size_bytes)
        if wanted is None:
            return web.Response(status=416, headers={"Content-Range": f"bytes */{size_bytes}"})
        response = web.StreamResponse(status=206 if _asks_for_part(request) else 200)
        if version := _etag(request):
            response.headers["ETag"] = version
        response.content_type = request.query.get("type", "application/octet-stream")
        response.content_length = len(wanted)
        response.headers["Accept-Ranges"] = "bytes"
        if response.status == 206:
            response.headers["Content-Range"] = f"bytes {wanted.start}-{wanted.stop - 1}/{size_bytes}"
        await response.prepare(request)
        if request.method == "GET":
            await _write(request, response, wanted)
        return response


async def _write(request: web.BaseRequest, response: web.StreamResponse, wanted: range) -> None:
    query = request.query
    pace = int(query["slow"]) if "slow" in query else None
    last = min(wanted.stop, wanted.start + int(query["truncate"])) if "truncate" in query else wanted.stop
    for chunk in files.chunks(query.get("seed", "0"), last, wanted.start):
        await (_write_slowly(response, chunk, pace) if pace else response.write(chunk))
        await asyncio.sleep(0)  # let others be served, and a lost connection be noticed
    if last < wanted.stop and request.transport is not None:
        request.transport.close()


async def _write_slowly(response: web.StreamResponse, chunk: bytes, bytes_per_second: int) -> None:
    step = max(1, bytes_per_second // 10)
    for start in range(0, len(chunk), step):
        await response.write(chunk[start : start + step])
        await asyncio.sleep(step / bytes_per_second)


def _etag(request: web.BaseRequest) -> str | None:
    """Return what tells this file from another: ``etag``, unless that is "none"; else what its bytes follow from."""
    version = request.query.get("etag", request.query.get("seed", "0"))
    return None if version == "none" else f'"{version}"'


def _asks_for_part(request: web.BaseRequest) -> bool:
    """Say whether a range is wanted, and of this very version if one is named (RFC 9110, 13.1.5)."""
    condition = request.headers.get("If-Range")
    return "Range" in request.headers and condition in (None, _etag(request))


def _range(request: web.BaseRequest, size_bytes: int) -> range | None:
    """Return the bytes that are asked for, or None if there are none such."""
    if not _asks_for_part(request):
        return range(size_bytes)
    parsed = _RANGE.fullmatch(request.headers["Range"])
    if parsed is None or int(parsed[1]) >= size_bytes:
        return None
    last = min(int(parsed[2] or size_bytes - 1), size_bytes - 1)
    return range(int(parsed[1]), last + 1)
