"""An S3 over HTTP for tests: as much of its REST API as storing, reading and deleting objects takes.

It is as strict as S3 is where it matters: requests are signed for the right key, parts but the last have 5 MiB, an
object is there only once its upload is complete, a range is answered with 206, and what is missing with S3's XML.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
import threading
from xml.etree import ElementTree

from aiohttp import web

ACCESS_KEY, SECRET_KEY = "test-access-key", "test-secret-key"
MIN_PART_BYTES = 5 * 1024 * 1024


class S3Server:
    """Objects by ``bucket/key``; ``requests`` has method, path and range of each."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.failing = False
        #: A code with which it refuses every request.
        self.refusal: str | None = None
        #: Without it is as a cloud whose client makes no conditions.
        self.heeds_conditions = True
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._started.wait()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        application = web.Application(client_max_size=64 * 1024 * 1024)
        application.router.add_route("*", "/{bucket}/{key:.*}", self._answer)
        application.router.add_route("*", "/{bucket}", self._answer)
        self._runner = web.AppRunner(application)
        self._loop.run_until_complete(self._runner.setup())
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        self._started.set()
        self._loop.run_forever()
        self._loop.run_until_complete(self._runner.cleanup())
        self._loop.close()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _answer(self, request: web.Request) -> web.Response:
        self.requests.append((request.method, request.path, request.headers.get("Range")))
        signature = request.headers.get("Authorization", "")
        if f"AWS4-HMAC-SHA256 Credential={ACCESS_KEY}/" not in signature:
            return _error(403, "InvalidAccessKeyId")
        if self.refusal:
            return _error(400 if self.refusal == "ExpiredToken" else 403, self.refusal)
        if self.failing:
            return _error(503, "SlowDown")
        name = f"{request.match_info['bucket']}/{request.match_info.get('key', '')}"
        body = _unchunked(await request.read(), request)
        if request.method == "PUT":
            return self._put(name, body, request)
        if request.method == "POST":
            return self._post(name, request)
        if request.method == "DELETE":
            self.uploads.pop(request.query.get("uploadId", ""), None)
            if "uploadId" not in request.query:
                self.objects.pop(name, None)
            return web.Response(status=204)
        if "list-type" in request.query:
            return _xml("ListBucketResult", "<KeyCount>0</KeyCount><IsTruncated>false</IsTruncated>")
        return self._get(name, request)

    def _put(self, name: str, body: bytes, request: web.Request) -> web.Response:
        if "uploadId" in request.query:
            self.uploads[request.query["uploadId"]][int(request.query["partNumber"])] = body
        else:
            self.objects[name] = body
        return web.Response(headers={"ETag": _etag(body)})

    def _post(self, name: str, request: web.Request) -> web.Response:
        if "uploads" in request.query:
            upload_id = secrets.token_hex(8)
            self.uploads[upload_id] = {}
            return _xml("InitiateMultipartUploadResult", f"<UploadId>{upload_id}</UploadId>")
        parts = self.uploads.pop(request.query["uploadId"])
        ordered = [parts[number] for number in sorted(parts)]
        if any(len(part) < MIN_PART_BYTES for part in ordered[:-1]):
            return _error(400, "EntityTooSmall")
        self.objects[name] = b"".join(ordered)
        return _xml("CompleteMultipartUploadResult", f"<ETag>{_etag(self.objects[name])}</ETag>")

    def _get(self, name: str, request: web.Request) -> web.Response:
        content = self.objects.get(name)
        if content is None:
            return _error(404, "NoSuchKey")
        headers = {"ETag": _etag(content), "Last-Modified": "Fri, 27 Nov 2026 10:00:00 GMT", "Accept-Ranges": "bytes"}
        if self.heeds_conditions and request.headers.get("If-Match", headers["ETag"]) != headers["ETag"]:
            return _error(412, "PreconditionFailed")
        if found := re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", "")):
            first, last = int(found[1]), min(int(found[2]), len(content) - 1)
            if first >= len(content):
                return _error(416, "InvalidRange")
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return web.Response(status=206, body=content[first : last + 1], headers=headers)
        return web.Response(body=content, headers=headers)


def _etag(content: bytes) -> str:
    return f'"{hashlib.md5(content, usedforsecurity=False).hexdigest()}"'


def _unchunked(body: bytes, request: web.Request) -> bytes:
    """Take the chunks' heads and the trailing checksum out of a body that AWS's clients send in chunks."""
    if "aws-chunked" not in request.headers.get("Content-Encoding", ""):
        return body
    content, rest = b"", body
    while True:
        head, _, rest = rest.partition(b"\r\n")
        size = int(head.partition(b";")[0], 16)
        if not size:
            return content
        content, rest = content + rest[:size], rest[size + 2 :]


def _xml(name: str, inner: str) -> web.Response:
    text = f'<{name} xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{inner}</{name}>'
    ElementTree.fromstring(text)
    return web.Response(text=text, content_type="application/xml")


def _error(status: int, code: str) -> web.Response:
    text = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>"
    return web.Response(status=status, text=text, content_type="application/xml")
