"""The error tree is what its drawing says, its texts are fit for a log, and no foreign exception goes untranslated."""

from __future__ import annotations

import inspect
import pickle
import re
import ssl
from datetime import timedelta

import pytest
import requests
import urllib3

from graph_client import errors
from graph_client.transport import FOREIGN, translate

SECRET = "https://outlook.office.com/api/upload?authtoken=s3cret"


def drawn_tree() -> dict[str, str]:
    """Return each name in the module's drawing with the name above it."""
    parents: dict[str, str] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        if match := re.fullmatch(r" {4}([│├└─ ]*)(\w+)(?: {2,}.*)?", line):
            depth = len(match[1]) // 4
            path[depth:] = [match[2]]
            parents[match[2]] = path[depth - 1] if depth else "Exception"
    return parents


def test_the_drawing_of_the_error_tree_shows_the_classes_as_they_are() -> None:
    classes = [each for _, each in inspect.getmembers(errors, inspect.isclass) if issubclass(each, errors.GraphError)]

    assert drawn_tree() == {each.__name__: each.__bases__[0].__name__ for each in classes}
    assert set(errors.__all__) == {each.__name__ for each in classes}


def test_every_error_says_when_it_is_raised() -> None:
    for name in set(errors.__all__) - {"GraphError"}:
        assert (getattr(errors, name).__doc__ or "").startswith("Raised "), name


def test_an_error_names_status_code_and_request_ids_but_not_graphs_words() -> None:
    error = errors.InvalidRecipient(
        "Recipient bob is not resolved",
        status=400,
        code="ErrorInvalidRecipients",
        request_id="r1",
        client_request_id="c1",
    )

    assert str(error) == (
        "InvalidRecipient (status 400, code ErrorInvalidRecipients, request-id r1, client-request-id c1)"
    )
    assert error.message == "Recipient bob is not resolved"


def test_an_error_survives_pickling() -> None:
    error = errors.Throttled("busy", status=429, retry_after=timedelta(seconds=3))
    error.scope = "tenant"

    copy = pickle.loads(pickle.dumps(error))

    assert (type(copy), copy.status, copy.retry_after, copy.scope) == (
        errors.Throttled,
        429,
        error.retry_after,
        "tenant",
    )


def exceptions_of(module: object, root: type[BaseException]) -> list[type[BaseException]]:
    found = [each for _, each in inspect.getmembers(module, inspect.isclass) if issubclass(each, root)]
    return [each for each in found if not issubclass(each, Warning)]


def bare(kind: type[BaseException]) -> BaseException:
    """Make an exception without its constructor, whose arguments differ with each class."""
    return kind.__new__(kind)


ALL_FOREIGN = sorted(
    {
        *exceptions_of(requests.exceptions, requests.RequestException),
        *exceptions_of(urllib3.exceptions, urllib3.exceptions.HTTPError),
        *exceptions_of(ssl, ssl.SSLError),
        ConnectionResetError,
        BrokenPipeError,
        TimeoutError,
        urllib3.exceptions.ProxySchemeUnsupported,
    },
    key=lambda kind: (kind.__module__, kind.__name__),
)

NEVER_LEAVING = {
    "requests.exceptions.ConnectTimeout",
    "requests.exceptions.ProxyError",
    "requests.exceptions.InvalidURL",
    "requests.exceptions.InvalidProxyURL",
    "requests.exceptions.InvalidSchema",
    "requests.exceptions.MissingSchema",
    "requests.exceptions.URLRequired",
    "urllib3.exceptions.ConnectTimeoutError",
    "urllib3.exceptions.NewConnectionError",
    "urllib3.exceptions.NameResolutionError",
    "urllib3.exceptions.ProxyError",
    "urllib3.exceptions.LocationValueError",
    "urllib3.exceptions.LocationParseError",
    "urllib3.exceptions.URLSchemeUnknown",
    "urllib3.exceptions.ProxySchemeUnknown",
    "urllib3.exceptions.ProxySchemeUnsupported",
    "urllib3.exceptions.EmptyPoolError",
    "urllib3.exceptions.ClosedPoolError",
}


@pytest.mark.parametrize("kind", ALL_FOREIGN, ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_every_foreign_exception_is_caught_and_means_something(kind: type[BaseException]) -> None:
    assert issubclass(kind, FOREIGN)

    on_send, on_other = (translate(bare(kind), repeatable=repeatable) for repeatable in (False, True))

    if f"{kind.__module__}.{kind.__name__}" in NEVER_LEAVING:
        assert type(on_send) is type(on_other) is errors.ConnectionFailed
    else:
        assert type(on_send) is errors.AnswerLost
        assert type(on_other) is errors.ConnectionLost


def test_what_never_left_is_found_inside_what_requests_wraps_around_it() -> None:
    refused = urllib3.exceptions.NewConnectionError(None, "refused")  # type: ignore[arg-type]
    wrapped = requests.ConnectionError(urllib3.exceptions.MaxRetryError(None, SECRET, refused))  # type: ignore[arg-type]

    error = translate(wrapped, repeatable=False)

    assert type(error) is errors.ConnectionFailed
    assert "s3cret" not in f"{error} {error.message}"
