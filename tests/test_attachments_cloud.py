"""Attachments in clouds' object stores: read where an operator has listed them, and nowhere else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3_server import ACCESS_KEY, SECRET_KEY, S3Server

from attachments import (
    AttachmentRefused,
    AttachmentSource,
    CloudPlace,
    InvalidSource,
    SizeMismatch,
    SourceChanged,
    SourceForbidden,
    SourceGone,
    SourceUnavailable,
    Store,
    StoreUnavailable,
    TooLarge,
    check_store_url,
)
from attachments.store import MARKER

FILE = hashlib.shake_256(b"a report").digest(6_000_000)
PREFIX = "s3://outgoing/reports"


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    started = S3Server()
    yield started
    started.stop()


@pytest.fixture
def s3(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """An S3 with one report in it, which AWS's client finds by its environment."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server.objects = {"outgoing/reports/a.pdf": FILE, "outgoing/reports-secret/a.pdf": b"", "hidden/a.pdf": b"secret"}
    server.uploads.clear()
    server.requests.clear()
    server.failing = False
    server.refusal = None
    server.heeds_conditions = True
    return server


def read(url: str, *, offset: int = 0, size: int | None = len(FILE), max_bytes: int = 10_000_000) -> bytes:
    source = AttachmentSource(cloud_urls=[PREFIX], max_bytes=max_bytes)
    with source.open(url, declared_size=size, offset=offset) as stream:
        return b"".join(stream.chunks(700_000))


def test_an_object_below_a_listed_prefix_is_read(s3: S3Server) -> None:
    assert read(f"{PREFIX}/a.pdf") == FILE
    assert all(path == "/outgoing/reports/a.pdf" for _, path, _ in s3.requests)


def test_reading_goes_on_in_the_middle_without_what_came_before(s3: S3Server) -> None:
    assert read(f"{PREFIX}/a.pdf", offset=5_000_000) == FILE[5_000_000:]
    ranges = [asked for method, _, asked in s3.requests if method == "GET" and asked]
    assert min(int(asked.removeprefix("bytes=").partition("-")[0]) for asked in ranges) >= 5_000_000


def test_no_more_than_a_few_blocks_are_asked_for_at_a_time(s3: S3Server) -> None:
    read(f"{PREFIX}/a.pdf")
    for _, _, asked in s3.requests:
        if asked:
            first, last = map(int, asked.removeprefix("bytes=").split("-"))
            assert last - first < 4 * 1024 * 1024


@pytest.mark.parametrize(
    "url",
    [
        "s3://hidden/a.pdf",
        "s3://outgoing/a.pdf",
        "s3://outgoing/reports-secret/a.pdf",
        "s3://outgoing/reports",
        "s3://OUTGOING/reports/a.pdf",
        "abfs://outgoing/reports/a.pdf",
        "s3://outgoing@hidden/reports/a.pdf",
    ],
)
def test_what_is_not_below_a_listed_prefix_is_refused_and_nothing_is_asked(s3: S3Server, url: str) -> None:
    with pytest.raises(SourceForbidden, match="ATTACHMENT_CLOUD_URLS"):
        read(url)
    assert s3.requests == []


@pytest.mark.parametrize(
    "rest",
    [
        "../../hidden/a.pdf",
        "x/../../../hidden/a.pdf",
        "./a.pdf",
        "%2e%2e/%2E%2e/hidden/a.pdf",
        "..%2f..%2fhidden/a.pdf",
        "//a.pdf",
        "a.pdf/",
        "..\\..\\hidden\\a.pdf",
        "a.pdf?versionId=1",
        "a.pdf#x",
        "*.pdf",
        "a.pdf::file:///etc/passwd",
        "\x00a.pdf",
    ],
)
def test_no_name_leads_out_of_the_prefix(s3: S3Server, rest: str) -> None:
    with pytest.raises(InvalidSource):
        read(f"{PREFIX}/{rest}")
    assert s3.requests == []


@pytest.mark.parametrize("url", ["file:///etc/passwd", "memory://outgoing/a", "local:///etc/passwd", "zip://a::s3://b"])
def test_other_file_systems_are_no_source(url: str) -> None:
    with pytest.raises(InvalidSource):
        read(url)


@pytest.mark.parametrize("url", ["file:///srv", "memory://x", "https://x/y", "s3://", "s3://b/../c", "s3://b//c", "x"])
def test_an_operator_cannot_list_what_is_no_place_in_a_cloud(url: str) -> None:
    with pytest.raises(ValueError, match=r"begins with none of s3://|not usable"):
        CloudPlace.parse(url)


def test_without_any_place_listed_no_object_is_read(s3: S3Server) -> None:
    with (
        pytest.raises(SourceForbidden),
        AttachmentSource(max_bytes=None).open(f"{PREFIX}/a.pdf"),
    ):
        pass
    assert s3.requests == []


def test_a_cloud_whose_package_is_missing_is_refused_with_the_extra_to_install() -> None:
    with pytest.raises(ValueError, match=r"install mailfleet\[azure\]"):
        CloudPlace.parse("abfs://reports@account.dfs.core.windows.net/outgoing")


def test_sizes_are_held_to_as_with_any_source(s3: S3Server) -> None:
    with pytest.raises(SizeMismatch):
        read(f"{PREFIX}/a.pdf", size=len(FILE) - 1)
    with pytest.raises(TooLarge):
        read(f"{PREFIX}/a.pdf", size=None, max_bytes=1000)


def test_an_object_that_is_missing_or_denied_is_refused_and_a_cloud_that_fails_is_asked_again(
    s3: S3Server,
) -> None:
    with pytest.raises(SourceGone):
        read(f"{PREFIX}/b.pdf")
    s3.failing = True
    with pytest.raises(SourceUnavailable):
        read(f"{PREFIX}/a.pdf")
    s3.failing = False
    s3.refusal = "AccessDenied"
    with pytest.raises(AttachmentRefused, match="does not hand out") as refused:
        read(f"{PREFIX}/a.pdf")
    assert "a.pdf" not in str(refused.value)


@pytest.mark.parametrize(
    "code", ["ExpiredToken", "InvalidAccessKeyId", "SignatureDoesNotMatch", "RequestTimeTooSkewed"]
)
def test_credentials_that_have_lapsed_are_the_operators_to_mend_and_no_fault_of_the_mail(
    s3: S3Server, code: str
) -> None:
    s3.refusal = code
    with pytest.raises(SourceUnavailable, match="refuses the store's credentials"):
        read(f"{PREFIX}/a.pdf")


def test_credentials_that_lapse_while_an_object_is_read_make_it_no_less_there(s3: S3Server) -> None:
    source = AttachmentSource(cloud_urls=[PREFIX], max_bytes=None)
    with source.open(f"{PREFIX}/a.pdf", declared_size=len(FILE)) as stream:
        stream.read(1_000_000)
        s3.refusal = "InvalidAccessKeyId"
        with pytest.raises(SourceUnavailable, match="refuses the store's credentials"):
            stream.read(len(FILE))


def test_a_key_that_nobody_knows_is_told_from_an_object_that_is_denied(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody-else")
    with pytest.raises(SourceUnavailable, match="refuses the store's credentials"):
        read_anew(f"{PREFIX}/a.pdf")


def test_an_object_that_changes_while_it_is_read_is_never_put_together_of_two(s3: S3Server) -> None:
    # Given a cloud whose client does not make the version a condition of what it reads, as Azure's does not
    s3.heeds_conditions = False
    source = AttachmentSource(cloud_urls=[PREFIX], max_bytes=None)
    with source.open(f"{PREFIX}/a.pdf", declared_size=len(FILE)) as stream:
        assert stream.read(1_000_000) == FILE[:1_000_000]
        # When
        s3.objects["outgoing/reports/a.pdf"] = FILE[::-1]
        # Then the last bytes, without which no upload is complete, are not handed out
        with pytest.raises(SourceChanged):
            stream.read(len(FILE))


def read_anew(url: str) -> bytes:
    """Read without the connection that other tests have made: fsspec keeps one for all that ask for the same."""
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()
    try:
        return read(url)
    finally:
        S3FileSystem.clear_instance_cache()


# The store


def test_the_store_may_be_a_bucket(s3: S3Server) -> None:
    store = Store("s3://attachments/sealed")
    store.write("one", [FILE, FILE[:100]])
    assert s3.objects["attachments/sealed/one"] == FILE + FILE[:100]
    with store.open("one") as file:
        file.seek(5_999_999)
        assert file.read(10) == FILE[-1:] + FILE[:9]
    store.delete("one")
    store.delete("one")
    assert "attachments/sealed/one" not in s3.objects


def test_a_bucket_keeps_nothing_of_what_broke_off(s3: S3Server) -> None:
    def breaking() -> Iterator[bytes]:
        yield FILE
        yield FILE
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        Store("s3://attachments").write("one", breaking())
    kept = [name for name in s3.objects if name.startswith("attachments")]
    assert (s3.uploads, kept) == ({}, [f"attachments/{MARKER}"])


def test_a_bucket_that_fails_is_told_from_one_that_lacks_the_file(s3: S3Server) -> None:
    store = Store("s3://attachments")
    store.write("other", [b"x"])
    with pytest.raises(SourceGone), store.open("never-written"):
        pass
    s3.failing = True
    with pytest.raises(StoreUnavailable):
        store.write("one", [b"x"])
    with pytest.raises(StoreUnavailable):
        store.delete("one")


class Elsewhere(Exception):
    """What fails beside the store while a file of it is open: Graph, the limiter, the lease."""


def test_what_fails_beside_the_store_is_not_taken_for_its_failure(s3: S3Server, tmp_path: Path) -> None:
    for url in ("s3://attachments", tmp_path.as_uri()):
        store = Store(url)
        store.write("one", [b"x"])
        with pytest.raises(Elsewhere), store.open("one"):
            raise Elsewhere


def test_an_empty_folder_in_the_place_of_a_store_is_none_and_nothing_counts_as_deleted(tmp_path: Path) -> None:
    # Given a mount point without its volume
    store = Store(tmp_path.as_uri())
    with pytest.raises(StoreUnavailable), store.open("one"):
        pass
    with pytest.raises(StoreUnavailable):
        store.delete("one")
    # When the volume is there
    store.write("two", [b"x"])
    # Then what is not there is gone
    with pytest.raises(SourceGone), store.open("one"):
        pass
    store.delete("one")


def test_a_folder_that_is_not_mounted_is_away_and_has_not_lost_its_files(tmp_path: Path) -> None:
    store = Store((tmp_path / "mounted").as_uri())
    store.write("one", [b"x"])
    (tmp_path / "mounted").rename(tmp_path / "elsewhere")
    with pytest.raises(StoreUnavailable), store.open("one"):
        pass
    with pytest.raises(StoreUnavailable):
        store.delete("one")


@pytest.mark.parametrize(
    "url",
    ["attachments", "file://attachments", "memory://x", "https://x/y", "s3://", "s3://b?x=1", "zip://a::file:///b"],
)
def test_a_store_is_an_absolute_folder_or_a_bucket(url: str) -> None:
    with pytest.raises(ValueError, match=r"absolute|begins with none|names no bucket|without"):
        check_store_url(url)
    assert check_store_url("file:///srv/attachments") == "file:///srv/attachments"
    assert check_store_url("s3://bucket/folder") == "s3://bucket/folder"
