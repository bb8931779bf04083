"""Folders and buckets by URL, through fsspec: what they are called, what they need, and what their failures mean."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import PurePosixPath
from typing import Any

import fsspec

from attachments.errors import AttachmentError, SourceGone, SourceUnavailable, StoreUnavailable

#: The package that knows each scheme of a cloud, and the extra of ours that brings it.
CLOUD_SCHEMES = {
    "s3": ("s3fs", "s3"),
    "abfs": ("adlfs", "azure"),
    "abfss": ("adlfs", "azure"),
    "az": ("adlfs", "azure"),
}
#: What is held of a file that is read, and of one that is written. S3 takes no smaller parts than 5 MiB.
READ_BLOCK_BYTES = 2 * 1024 * 1024
WRITE_BLOCK_BYTES = 5 * 1024 * 1024
#: What S3 says when it refuses whoever asks, not the object
#: (https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html).
_REFUSES_US = frozenset(
    {
        "AccountProblem",
        "AllAccessDisabled",
        "ExpiredToken",
        "InvalidAccessKeyId",
        "InvalidSecurity",
        "NotSignedUp",
        "RequestTimeTooSkewed",
        "SignatureDoesNotMatch",
    }
)


def demand_scheme(url: str) -> str:
    """Return the cloud's scheme of a URL.

    Raises:
        ValueError: It is none that we know, or lacks its package; says what to do.
    """
    scheme = url.partition("://")[0].lower()
    if scheme not in CLOUD_SCHEMES:
        raise ValueError(f"begins with none of {', '.join(f'{each}://' for each in CLOUD_SCHEMES)}")
    package, extra = CLOUD_SCHEMES[scheme]
    if find_spec(package) is None:
        raise ValueError(f"{scheme}:// needs the package {package}: install mailfleet[{extra}]")
    return scheme


class Folder:
    """A folder or a bucket, or a part of it, that is connected to by whoever first needs it."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._lock = threading.Lock()
        self._connected: tuple[Any, str] | None = None

    def at(self, *parts: str) -> tuple[Any, str]:
        """Return the file system and the path of what lies under the folder by these names."""
        with self._lock:  # a process may be forked before, and never while, somebody connects
            if self._connected is None:
                self._connected = fsspec.core.url_to_fs(self._url, use_listings_cache=False)
        filesystem, root = self._connected
        return filesystem, str(PurePosixPath(root, *parts))


@contextmanager
def failures_of(origin: str, unavailable: type[SourceUnavailable] = SourceUnavailable) -> Iterator[None]:
    """Raise what fails in a file system as an error of attachments: its text may quote a key or a signature."""
    try:
        yield
    except AttachmentError:
        raise
    except FileNotFoundError:
        raise SourceGone(f"{origin} has no such file") from None
    except PermissionError as exc:
        if unavailable is StoreUnavailable:
            raise StoreUnavailable(f"{origin} does not let us in") from exc
        if _refuses_us(exc):
            raise SourceUnavailable(f"{origin} refuses the store's credentials") from exc
        raise SourceGone(f"{origin} does not hand out the attachment") from exc
    except Exception as exc:  # every cloud has errors of its own
        raise unavailable(f"{origin} cannot be reached, or broke off ({type(exc).__name__})") from exc


def _refuses_us(error: BaseException) -> bool:
    """Say whether it is our credentials that are refused: the operator's to mend, whatever the mail is."""
    while (cause := error.__cause__) is not None:
        error = cause
        answer = getattr(error, "response", None)
        if isinstance(answer, dict) and answer.get("Error", {}).get("Code") in _REFUSES_US:
            return True
    return False
