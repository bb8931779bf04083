"""Reading goes on in the same file or not at all, and a file that is plainly another than declared is refused."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import test_attachments
from test_attachments import FILE, URL, Answer, Internet, Source, answer, opener

from attachments import SourceChanged, TypeMismatch

certificates, source, internet = test_attachments.certificates, test_attachments.source, test_attachments.internet

DATE = "Fri, 13 Feb 2026 12:00:00 GMT"


def versioned(body: bytes, *headers: str, honours: bool = True) -> Answer:
    """A source with ranges and a version; one that does not honour ``If-Range`` answers any range."""

    def send(request: str) -> Iterator[bytes]:
        wanted = re.search(r"Range: bytes=(\d+)-\r", request)
        condition = re.search(r"If-Range: (.*?)\r", request)
        current = not honours or condition is None or any(header.endswith(condition[1]) for header in headers)
        if wanted is None or not current:
            return answer(body, headers=headers)(request)
        start = int(wanted[1])
        part = f"Content-Range: bytes {start}-{len(body) - 1}/{len(body)}"
        return answer(body[start:], "206 Partial Content", [*headers, part])(request)

    return send


def rest(internet: Internet, version: str | None) -> bytes:
    with opener(internet).open(URL, declared_size=len(FILE), offset=1000, version=version) as stream:
        return stream.read(len(FILE))


@pytest.mark.parametrize(
    ("headers", "version"),
    [
        (['ETag: "one"'], '"one"'),
        ([f"Last-Modified: {DATE}"], DATE),
        (['ETag: "one"', f"Last-Modified: {DATE}"], '"one"'),
        (['ETag: W/"one"', f"Last-Modified: {DATE}"], DATE),
        (['ETag: W/"one"'], 'W/"one"'),
        (["ETag: one"], None),
        ([f'ETag: "{"x" * 300}"'], None),
        (['ETag: "\x01"'], None),
        ([], None),
    ],
)
def test_a_version_is_what_may_be_a_condition_and_can_be_kept(
    source: Source, internet: Internet, headers: list[str], version: str | None
) -> None:
    source.answers["/file.pdf"] = answer(headers=headers)
    with opener(internet).open(URL) as stream:
        assert stream.version == version


@pytest.mark.parametrize(("header", "version"), [('ETag: "one"', '"one"'), (f"Last-Modified: {DATE}", DATE)])
def test_the_rest_of_the_same_file_is_asked_for_and_read(
    source: Source, internet: Internet, header: str, version: str
) -> None:
    source.answers["/file.pdf"] = versioned(FILE, header)
    assert rest(internet, version) == FILE[1000:]
    assert f"Range: bytes=1000-\r\nIf-Range: {version}\r\n" in source.requests[0]
    assert len(source.requests) == 1


@pytest.mark.parametrize("honours", [True, False])
def test_another_file_at_the_same_url_is_told_by_its_version(source: Source, internet: Internet, honours: bool) -> None:
    source.answers["/file.pdf"] = versioned(FILE, 'ETag: "two"', honours=honours)
    with pytest.raises(SourceChanged, match=r"^https://source.test has changed"):
        rest(internet, '"one"')


def test_a_source_that_tells_no_version_any_more_is_believed(source: Source, internet: Internet) -> None:
    source.answers["/file.pdf"] = versioned(FILE)
    assert rest(internet, '"one"') == FILE[1000:]


SAME = [
    ("application/pdf", "application/pdf; charset=binary"),
    ("application/pdf", "APPLICATION/PDF"),
    ("application/pdf", "application/x-pdf"),
    ("application/pdf", "application/octet-stream"),
    ("application/pdf", "binary/octet-stream"),
    ("application/pdf", None),
    ("application/octet-stream", "text/html"),
    (None, "text/html"),
    ("text/csv", "text/plain; charset=utf-8"),
    ("image/jpeg", "image/jpg"),
    ("application/zip", "application/x-zip-compressed"),
    ("application/vnd.openxmlformats-officedocument.wordprocessingml.document", "application/zip"),
    ("text/xml", "application/xml"),
    ("image/svg+xml", "text/xml"),
    ("application/pdf", "nonsense"),
]
OTHER = [
    ("application/pdf", "text/html; charset=utf-8"),
    ("application/pdf", "image/png"),
    ("image/png", "image/jpeg"),
    ("application/zip", "application/json"),
]


@pytest.mark.parametrize(("declared", "found"), SAME)
def test_a_type_that_goes_with_the_declared_one_is_read(
    source: Source, internet: Internet, declared: str | None, found: str | None
) -> None:
    source.answers["/file.pdf"] = answer(headers=[f"Content-Type: {found}"] if found else [])
    with opener(internet).open(URL, declared_type=declared) as stream:
        assert stream.read(len(FILE)) == FILE


@pytest.mark.parametrize(("declared", "found"), OTHER)
def test_a_file_that_is_plainly_another_is_refused(
    source: Source, internet: Internet, declared: str, found: str
) -> None:
    source.answers["/file.pdf"] = answer(headers=[f"Content-Type: {found}"])
    refusal = rf"^https://source.test has a file of another type than {declared}, which was declared$"
    with pytest.raises(TypeMismatch, match=refusal), opener(internet).open(URL, declared_type=declared):
        pass
