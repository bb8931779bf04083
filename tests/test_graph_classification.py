"""What each of Graph's answers tells the caller to do."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest

from graph_client import errors
from graph_client.classification import CODES, Operation, Reply, classify, without_addresses

SEND = Operation("send_mail", target="mailbox", repeatable=False)
SEND_DRAFT = Operation("send_draft", repeatable=False)
CREATE = Operation("create_draft", target="mailbox")
GET = Operation("get_message")
ATTACH = Operation("attach")
UPLOAD = Operation("upload_range", target="upload")
EVERY_OPERATION = [SEND, SEND_DRAFT, CREATE, GET, ATTACH, UPLOAD]


def reply(status: int, code: str = "", message: str = "", **headers: str) -> Reply:
    body = json.dumps({"error": {"code": code, "message": message}}).encode() if code or message else b""
    return Reply(status, {name.replace("_", "-").lower(): value for name, value in headers.items()}, body, "c1")


@pytest.mark.parametrize("operation", [SEND, SEND_DRAFT])
@pytest.mark.parametrize("status", [200, 201, 204, 408, 500, 501, 502, 503, 504, 520])
def test_an_answer_to_a_send_that_proves_nothing_leaves_the_outcome_unknown(operation: Operation, status: int) -> None:
    for code in (
        "",
        "ErrorInternalServerError",
        "ErrorSubmissionQuotaExceeded",
        "ErrorServerBusy",
        "ErrorItemNotFound",
    ):
        assert type(classify(reply(status, code), operation)) is errors.AnswerUnclear


def test_an_unclear_answer_to_a_send_keeps_the_wait_that_graph_asked_for() -> None:
    error = classify(reply(503, Retry_After="17"), SEND)

    assert (type(error), error.retry_after) == (errors.AnswerUnclear, timedelta(seconds=17))


@pytest.mark.parametrize("operation", EVERY_OPERATION, ids=lambda operation: operation.name)
@pytest.mark.parametrize("status", [429, 509])
@pytest.mark.parametrize(
    "code", ["", "ApplicationThrottled", "TooManyRequests", "UnknownError", "ErrorServerBusy", "New"]
)
def test_a_429_is_a_throttle_whatever_the_call_and_the_code(operation: Operation, status: int, code: str) -> None:
    error = classify(reply(status, code, Retry_After="0,120"), operation)

    assert isinstance(error, errors.Throttled)
    assert (error.retry_after, error.scope) == (timedelta(seconds=120), "mailbox")


@pytest.mark.parametrize("date", ["Sun, 01 Mar 2026 12:00:00 GMT", "Sun, 01 Mar 2099 12:00:00 GMT"])
def test_a_date_to_wait_for_is_reckoned_by_the_clock_that_wrote_it(date: str) -> None:
    later = date.replace("12:00:00", "12:00:40")
    assert classify(reply(429, Retry_After=later, Date=date), GET).retry_after == timedelta(seconds=40)


@pytest.mark.parametrize("date", [{}, {"Date": "soon"}])
def test_without_a_date_of_the_answer_ours_will_do(date: dict[str, str]) -> None:
    assert classify(reply(429, Retry_After="Sun, 01 Mar 2026 12:00:40 GMT", **date), GET).retry_after == timedelta(0)


def test_a_throttle_that_says_no_wait_has_none() -> None:
    assert classify(reply(429), GET).retry_after is None


@pytest.mark.parametrize(
    ("named", "scope"),
    [
        ("Tenant_Application/ReadWrite/9a3d/2fc1", "tenant"),
        ("Application/ReadWrite/9a3d", "tenant"),
        ("Mailbox", "mailbox"),
    ],
)
def test_a_throttle_whose_scope_graph_names_binds_that_scope(named: str, scope: str) -> None:
    error = classify(reply(429, x_ms_throttle_scope=named), GET)

    assert isinstance(error, errors.Throttled)
    assert error.scope == scope


@pytest.mark.parametrize(
    ("answer", "leaf"),
    [
        (reply(503, "ErrorServerBusy", Retry_After="5"), errors.Throttled),
        (reply(503, Retry_After="5"), errors.Throttled),
        (reply(503), errors.ServerUnavailable),
        (reply(503, "ErrorServerBusy"), errors.ServerUnavailable),
        (reply(503, "ResourceUnhealthy"), errors.Throttled),
        (reply(500, "ErrorMailboxMoveInProgress"), errors.ServerUnavailable),
        (reply(500, "ErrorMimeContentConversionFailed"), errors.InvalidMessage),
        (reply(500, "SomethingNew"), errors.ServerUnavailable),
        (reply(502), errors.ServerUnavailable),
        (reply(504, "UnknownError"), errors.ServerUnavailable),
        (reply(408), errors.ServerUnavailable),
        (reply(200), errors.ServerUnavailable),
    ],
)
def test_a_failing_server_is_classified_by_its_code_when_the_call_may_be_repeated(
    answer: Reply, leaf: type[errors.GraphError]
) -> None:
    assert type(classify(answer, CREATE)) is leaf


@pytest.mark.parametrize(("operation", "status"), [(SEND, 403), (SEND, 429), (CREATE, 500)])
def test_a_used_up_submission_quota_waits_an_hour_when_graph_says_nothing(operation: Operation, status: int) -> None:
    error = classify(reply(status, "ErrorSubmissionQuotaExceeded"), operation)

    assert (type(error), error.retry_after) == (errors.Throttled, timedelta(hours=1))


@pytest.mark.parametrize(
    ("answer", "leaf"),
    [
        (reply(400, "ErrorInvalidRecipients"), errors.InvalidRecipient),
        (reply(400, "ErrorInvalidSmtpAddress"), errors.InvalidRecipient),
        (reply(400, "UnableToDeserializePostBody"), errors.InvalidMessage),
        (reply(400, "InvalidInternetMessageHeader"), errors.InvalidMessage),
        (reply(400, "NeverSeenBefore"), errors.InvalidMessage),
        (reply(400), errors.InvalidMessage),
        (reply(415), errors.InvalidMessage),
        (reply(400, "ErrorMessageSizeExceeded"), errors.MessageTooLarge),
        (reply(413), errors.MessageTooLarge),
        (reply(400, "BadRequest", "Maximum request length exceeded."), errors.MessageTooLarge),
        (reply(400, "BadRequest", "The maximum request length supported is 4MB."), errors.MessageTooLarge),
        (reply(400, "ErrorQuotaExceeded"), errors.MailboxFull),
        (reply(507), errors.MailboxFull),
        (reply(401, "InvalidAuthenticationToken"), errors.TokenRefused),
        (reply(401), errors.TokenRefused),
        (reply(401, "NoPermissionsInAccessToken"), errors.MissingRole),
        (reply(403, "ErrorAccessDenied", "Access to OData is disabled."), errors.MailboxDenied),
        (reply(403, "ErrorSendAsDenied"), errors.MailboxDenied),
        (reply(403), errors.MailboxDenied),
        (reply(404, "ErrorInvalidUser"), errors.MailboxUnknown),
        (reply(404, "ErrorNonExistentMailbox"), errors.MailboxUnknown),
        (reply(404), errors.MailboxUnknown),
        (reply(404, "MailboxNotEnabledForRESTAPI"), errors.MailboxUnlicensed),
        (reply(403, "ErrorExceededMessageLimit"), errors.MailboxBlocked),
        (reply(429, "ErrorExceededMessageLimit"), errors.MailboxBlocked),
        (reply(409, "ErrorIrresolvableConflict"), errors.Conflict),
        (reply(412), errors.Conflict),
        (reply(302), errors.UnexpectedRedirect),
    ],
)
def test_a_refusal_is_as_plain_to_a_send_as_to_any_call(answer: Reply, leaf: type[errors.GraphError]) -> None:
    assert type(classify(answer, SEND)) is leaf
    assert type(classify(answer, CREATE)) is leaf


def test_a_refusal_for_a_passing_reason_is_transient() -> None:
    message = (
        "Cannot send this mail due to a transient error. Please try again later (0x00004000)., "
        "WASCL UserAction verdict is not None. Actual verdict is TransientError."
    )

    assert type(classify(reply(403, "ErrorAccessDenied", message), SEND)) is errors.ServerUnavailable


@pytest.mark.parametrize("operation", [GET, SEND_DRAFT, ATTACH], ids=lambda operation: operation.name)
@pytest.mark.parametrize(
    "answer",
    [reply(404), reply(404, "ErrorItemNotFound"), reply(410), reply(400, "ErrorInvalidIdMalformed")],
)
def test_an_id_that_names_nothing_is_an_item_not_found(operation: Operation, answer: Reply) -> None:
    assert type(classify(answer, operation)) is errors.ItemNotFound


def test_a_draft_that_can_no_longer_be_sent_is_an_item_not_found() -> None:
    assert type(classify(reply(400, "ErrorInvalidItemForOperationSendItem"), SEND_DRAFT)) is errors.ItemNotFound


@pytest.mark.parametrize(
    ("answer", "leaf"),
    [
        (reply(413), errors.AttachmentTooLarge),
        (reply(400, "BadRequest", "Maximum request length exceeded."), errors.AttachmentTooLarge),
        (reply(400, "ErrorAttachmentSizeLimitExceeded"), errors.AttachmentTooLarge),
        (reply(400, "ErrorAttachmentSizeShouldNotBeLessThanMinimumSize"), errors.AttachmentTooSmall),
        (reply(400, "ErrorMessageSizeExceeded"), errors.MessageTooLarge),
    ],
)
def test_an_attachment_of_the_wrong_size_says_which_way_to_go(answer: Reply, leaf: type[errors.GraphError]) -> None:
    assert type(classify(answer, ATTACH)) is leaf


@pytest.mark.parametrize(
    ("answer", "leaf"),
    [
        (reply(401), errors.UploadSessionLost),
        (reply(403, "ErrorAccessDenied"), errors.UploadSessionLost),
        (reply(404, "ErrorItemNotFound"), errors.UploadSessionLost),
        (reply(404, "uploadSessionNotFound"), errors.UploadSessionLost),
        (reply(410), errors.UploadSessionLost),
        (reply(416), errors.UploadOutOfOrder),
        (reply(400, "fragmentOverlap"), errors.UploadOutOfOrder),
        (reply(400, "ErrorMessageSizeExceeded"), errors.MessageTooLarge),
        (reply(500), errors.ServerUnavailable),
    ],
)
def test_an_upload_that_is_refused_says_how_to_go_on(answer: Reply, leaf: type[errors.GraphError]) -> None:
    assert type(classify(answer, UPLOAD)) is leaf


def test_a_range_out_of_order_says_which_is_due_when_graph_does() -> None:
    body = b'{"error": {"code": "invalidRange"}, "nextExpectedRanges": ["3932160-"]}'

    known = classify(Reply(416, {}, body, "c1"), UPLOAD)
    unknown = classify(reply(416), UPLOAD)

    assert isinstance(known, errors.UploadOutOfOrder)
    assert known.expected_offset == 3_932_160
    assert isinstance(unknown, errors.UploadOutOfOrder)
    assert unknown.expected_offset is None


@pytest.mark.parametrize("inner", ["innerError", "innererror"])
def test_the_innermost_code_that_is_known_decides(inner: str) -> None:
    body = {"error": {"code": "BadRequest", inner: {"code": "ErrorInvalidRecipients", inner: {"code": "42"}}}}

    error = classify(Reply(400, {}, json.dumps(body).encode(), "c1"), SEND)

    assert (type(error), error.code) == (errors.InvalidRecipient, "ErrorInvalidRecipients")


@pytest.mark.parametrize("words", ["bob@example.org", "Dear Bob", "https://a/b", "a\nb", "", "x" * 101, "Code-é"])
def test_what_is_no_code_in_the_place_of_one_is_neither_told_nor_counted(words: str) -> None:
    counted: list[tuple[int, str]] = []
    body = {"error": {"code": words, "innerError": {"code": "New.Code_7", "innerError": {"code": words}}}}
    error = classify(Reply(404, {}, json.dumps(body).encode(), "c1"), GET, lambda *told: counted.append(told))
    assert (error.code, counted) == ("New.Code_7", [(404, "New.Code_7")])
    alone = classify(reply(400, words, "message"), SEND)
    assert not alone.code
    assert not words or words not in str(alone)


def test_a_code_is_known_in_any_case() -> None:
    assert type(classify(reply(400, "errorinvalidrecipients"), SEND)) is errors.InvalidRecipient


def test_an_unknown_code_is_counted_and_one_that_says_nothing_is_not() -> None:
    counted: list[tuple[int, str]] = []
    for code in ("SomethingNew", "", "UnknownError", "ErrorItemNotFound"):
        classify(reply(404, code), GET, lambda status, code: counted.append((status, code)))

    assert counted == [(404, "SomethingNew")]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>502</html>",
        b"\xff\xfe",
        b"[]",
        b"null",
        b'"text"',
        b'{"error": "text"}',
        b'{"error": null}',
        b'{"error": {"code": 7, "message": null, "innerError": "x"}}',
        b'{"error": {"code": null, "innerError": {"code": {}}}}',
    ],
)
@pytest.mark.parametrize("operation", EVERY_OPERATION, ids=lambda operation: operation.name)
def test_a_body_of_any_shape_is_classified_by_its_status(operation: Operation, body: bytes) -> None:
    for status in (*range(300, 309), *range(400, 419), 423, 429, *range(500, 512)):
        assert isinstance(classify(Reply(status, {}, body, "c1"), operation), errors.GraphError)


def test_an_error_carries_the_ids_that_support_asks_for() -> None:
    error = classify(reply(400, "BadRequest", request_id="r1"), SEND)

    assert (error.status, error.code, error.request_id, error.client_request_id) == (400, "BadRequest", "r1", "c1")


def test_only_sends_can_have_an_unknown_outcome() -> None:
    found: set[Any] = set()
    for operation in (CREATE, GET, ATTACH, UPLOAD):
        for status in range(200, 600):
            for code in ("", *CODES):
                found.add(type(classify(reply(status, code), operation)))

    assert not [leaf for leaf in found if issubclass(leaf, errors.OutcomeUnknown)]


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("The requested user 'ann@contoso.example' is invalid.", "The requested user … is invalid."),
        ("Recipient 'Bob Builder' is not resolved.", "Recipient … is not resolved."),
        ('Cannot parse "secret words".', "Cannot parse …."),
        ("bob@fabrikam.example, carol%40x.example", "…, …"),
        ("See https://outlook.office.com/a?authtoken=t now", "See … now"),
        ("The sender's submission quota, it can't wait", "The sender's submission quota, it can't wait"),
    ],
)
def test_graphs_words_are_kept_without_what_they_quote(said: str, kept: str) -> None:
    assert without_addresses(said) == kept
