"""Every method, with the real msal over TLS, against the simulator: the two know nothing of each other."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from graph_client import (
    SMALL_ATTACHMENT_BYTES,
    UPLOAD_RANGE_BYTES,
    Call,
    GraphClient,
    Message,
    TokenSource,
    errors,
    looking_first,
)
from simulator.control import Simulator

TAG_ID = "String {9b5c0f2e-6f0b-4a44-8d6e-0b6f3f1f8a11} Name email-id"
APP, SECRET, TENANT = "app-id", "app-secret", "contoso.example"
TIMEOUT = timedelta(seconds=10)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    folder = tmp_path_factory.mktemp("graph")
    with Simulator.start(folder, client_id=APP, client_secret=SECRET, tenant=TENANT) as simulator:
        yield simulator


@pytest.fixture
def simulator(running: Simulator, monkeypatch: pytest.MonkeyPatch) -> Simulator:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", running.ca_bundle)
    running.reset()
    running.set_behaviour(sent_items_delay_seconds=0, immutable_ids="stable")
    return running


@pytest.fixture
def tokens(simulator: Simulator) -> TokenSource:
    return TokenSource(simulator.authority, TENANT, APP, secret=SECRET)


@pytest.fixture
def graph(simulator: Simulator, tokens: TokenSource) -> GraphClient:
    return GraphClient(simulator.graph_base_url, tokens, TIMEOUT, TAG_ID)


@pytest.fixture
def mailbox() -> str:
    return f"ann-{uuid.uuid4().hex[:8]}@contoso.example"


def mail(subject: str = "Grüße") -> dict[str, Any]:
    return {
        "subject": subject,
        "body": {"contentType": "text", "content": "Hello"},
        "toRecipients": [{"emailAddress": {"address": "bob@fabrikam.example"}}],
    }


def test_a_sent_mail_is_found_by_its_tag(graph: GraphClient, simulator: Simulator, mailbox: str) -> None:
    began = datetime.now(UTC)

    answer = graph.send_mail(mailbox, graph.tagged(mail(), "it's-1"))

    assert answer.request_id
    (delivery,) = simulator.deliveries(mailbox)
    assert delivery["tags"] == ["it's-1"]
    (found,) = graph.find_by_tag(mailbox, "it's-1", since=began - timedelta(minutes=1)).messages
    assert not found.is_draft
    assert found.sent_at is not None
    assert graph.get_message(mailbox, found.id) == found


@pytest.mark.parametrize("alternatives", [True, False])
def test_several_sent_mails_are_found_by_their_tags_each_by_its_own(
    graph: GraphClient, simulator: Simulator, mailbox: str, alternatives: bool
) -> None:
    simulator.set_behaviour(filters_take_alternatives=alternatives)
    began = datetime.now(UTC)
    for value in ("One-1", "two'2", "other"):
        graph.send_mail(mailbox, graph.tagged(mail(), value))
    for _ in range(2):  # the second time it is known whether Graph takes them
        found = graph.find_by_tags(mailbox, ["One-1", "two'2", "absent"], since=began - timedelta(minutes=1))
        assert {value: len(messages) for value, messages in found.items()} == {"One-1": 1, "two'2": 1, "absent": 0}
        assert found["One-1"] == graph.find_by_tag(mailbox, "One-1").messages
        assert graph.requests_to_find(3) == (1 if alternatives else 3)


def test_what_is_looked_at_last_keeps_a_request_from_leaving(
    tokens: TokenSource, simulator: Simulator, mailbox: str
) -> None:
    calls: list[Call] = []
    graph = GraphClient(simulator.graph_base_url, tokens, timedelta(seconds=5), TAG_ID, on_call=calls.append)
    # Given a token that is refused, so that a send takes two
    simulator.expire_token(mailbox, operation="send_mail")

    def look() -> None:
        if len(simulator.requests(operation="token")) == 2:
            raise LookupError("the second token took too long to come")

    # When
    with looking_first(look), pytest.raises(LookupError):
        graph.send_mail(mailbox, mail())

    # Then the send that would have come with the second token was never made
    assert [request["status"] for request in simulator.requests(mailbox)] == ["401"]
    assert [call.status for call in calls] == [401]
    graph.send_mail(mailbox, mail())
    assert len(simulator.deliveries(mailbox)) == 1


def test_what_was_created_before_is_left_out_of_a_search(graph: GraphClient, mailbox: str) -> None:
    graph.create_draft(mailbox, graph.tagged(mail(), "e1"))

    assert graph.find_by_tag(mailbox, "e1", since=datetime.now(UTC) + timedelta(minutes=1)).messages == []
    assert [found.is_draft for found in graph.find_by_tag(mailbox, "e1").messages] == [True]
    assert graph.find_by_tag(mailbox, "e2").messages == []


def test_a_search_reads_every_page(graph: GraphClient, mailbox: str) -> None:
    drafts = {graph.create_draft(mailbox, graph.tagged(mail(), "same")).id for _ in range(103)}

    assert {found.id for found in graph.find_by_tag(mailbox, "same").messages} == drafts


def test_a_draft_with_attachments_is_sent_whole(graph: GraphClient, simulator: Simulator, mailbox: str) -> None:
    # Given a draft with a small attachment and a large one
    draft = graph.create_draft(mailbox, graph.tagged(mail(), "e1"))
    small, large = b"s" * SMALL_ATTACHMENT_BYTES, bytes(range(256)) * 40_000
    attached = graph.attach(mailbox, draft.id, name="small.bin", content_type="application/x-a", content=small)
    upload(graph, mailbox, draft, large)
    listed = {each.name: each for each in graph.attachments(mailbox, draft.id)}
    assert listed["small.bin"].id == attached.id
    assert listed["large.bin"].size_bytes >= len(large)
    # When it is sent
    graph.send_draft(mailbox, draft.id)
    # Then it leaves with both, and its MIME holds them
    (delivery,) = simulator.deliveries(mailbox)
    digests = {each["name"]: each["sha256"] for each in delivery["attachments"]}
    assert digests == {
        "small.bin": hashlib.sha256(small).hexdigest(),
        "large.bin": hashlib.sha256(large).hexdigest(),
    }
    with graph.fetch_mime(mailbox, draft.id) as chunks:
        received = list(chunks)
    assert sum(map(len, received)) > (len(small) + len(large)) * 4 / 3
    assert max(map(len, received)) <= 64 * 1024


def upload(graph: GraphClient, mailbox: str, draft: Message, content: bytes) -> None:
    session = graph.create_upload_session(
        mailbox, draft.id, name="large.bin", size_bytes=len(content), content_type="application/x-b"
    )
    assert session.expires_at is not None
    offset: int | None = session.next_offset
    while offset is not None:
        offset = graph.upload_range(session, offset, content[offset : offset + UPLOAD_RANGE_BYTES], len(content))


def test_an_attachment_is_taken_off_again(graph: GraphClient, mailbox: str) -> None:
    draft = graph.create_draft(mailbox, mail())
    attachment = graph.attach(
        mailbox, draft.id, name="l.png", content_type="image/png", content=b"x", is_inline=True, content_id="logo"
    )
    assert (attachment.is_inline, attachment.content_id) == (True, "logo")

    graph.delete_attachment(mailbox, draft.id, attachment.id)

    assert graph.attachments(mailbox, draft.id) == []


def test_a_range_out_of_order_and_a_session_given_up_are_told_apart(graph: GraphClient, mailbox: str) -> None:
    draft = graph.create_draft(mailbox, mail())
    session = graph.create_upload_session(
        mailbox, draft.id, name="a", size_bytes=4_000_000, content_type="application/x-a"
    )
    with pytest.raises(errors.UploadOutOfOrder):
        graph.upload_range(session, 10, b"x", 4_000_000)

    graph.cancel_upload(session)
    graph.cancel_upload(session)

    with pytest.raises(errors.UploadSessionLost):
        graph.upload_range(session, 0, b"x", 4_000_000)


def test_a_size_on_the_wrong_side_of_the_boundary_says_so(
    graph: GraphClient, simulator: Simulator, mailbox: str
) -> None:
    draft = graph.create_draft(mailbox, mail())
    with pytest.raises(errors.AttachmentTooSmall):
        graph.create_upload_session(mailbox, draft.id, name="a", size_bytes=10, content_type="text/plain")

    for answer in ("empty", "html", "bad_request"):
        simulator.set_behaviour(max_request_bytes=1000, oversize_answer=answer)
        with pytest.raises(errors.AttachmentTooLarge):
            graph.attach(mailbox, draft.id, name="a", content_type="text/plain", content=bytes(2000))
        with pytest.raises(errors.MessageTooLarge):
            graph.send_mail(mailbox, mail("x" * 2000))


def test_a_deleted_draft_is_not_found(graph: GraphClient, mailbox: str) -> None:
    draft = graph.create_draft(mailbox, mail())
    graph.delete_message(mailbox, draft.id)

    with pytest.raises(errors.ItemNotFound):
        graph.send_draft(mailbox, draft.id)


@pytest.mark.parametrize("second_send", ["not_found", "invalid"])
def test_a_draft_that_was_sent_is_not_sent_again(
    graph: GraphClient, simulator: Simulator, mailbox: str, second_send: str
) -> None:
    simulator.set_behaviour(second_send=second_send)
    draft = graph.create_draft(mailbox, mail())
    graph.send_draft(mailbox, draft.id)

    with pytest.raises(errors.ItemNotFound):
        graph.send_draft(mailbox, draft.id)

    assert len(simulator.deliveries(mailbox)) == 1


LOSSES: list[tuple[Callable[[Simulator], None], int]] = [
    (lambda simulator: simulator.lose_next_answer(), 1),
    (lambda simulator: simulator.reset_connection(), 0),
    (lambda simulator: simulator.hang(executed=True), 1),
    (lambda simulator: simulator.hang(executed=False), 0),
    (lambda simulator: simulator.fail(504, executed=True, body="html"), 1),
    (lambda simulator: simulator.fail(504, executed=False, body="empty"), 0),
    (lambda simulator: simulator.fail(503, retry_after="3"), 0),
    (lambda simulator: simulator.fail(500, "ErrorInternalServerTransientError"), 0),
]


@pytest.mark.parametrize(("lose", "deliveries"), LOSSES)
def test_a_send_that_may_have_been_done_says_just_that(
    simulator: Simulator,
    tokens: TokenSource,
    mailbox: str,
    lose: Callable[[Simulator], None],
    deliveries: int,
) -> None:
    tokens.token()
    calls: list[Call] = []
    graph = GraphClient(simulator.graph_base_url, tokens, timedelta(milliseconds=500), TAG_ID, on_call=calls.append)
    lose(simulator)

    with pytest.raises(errors.OutcomeUnknown):
        graph.send_mail(mailbox, mail())

    assert len(simulator.deliveries(mailbox)) == deliveries
    assert len(calls) == 1


def test_an_accepted_send_with_a_retry_after_is_done(graph: GraphClient, simulator: Simulator, mailbox: str) -> None:
    simulator.accept_with_retry_after()

    graph.send_mail(mailbox, mail())

    assert len(simulator.deliveries(mailbox)) == 1


@pytest.mark.parametrize(("retry_after", "seconds"), [("3", 3), ("0.249", 0.249), ("0,120", 120), (None, None)])
def test_a_throttled_send_says_how_long_to_wait(
    graph: GraphClient, simulator: Simulator, mailbox: str, retry_after: str | None, seconds: float | None
) -> None:
    simulator.throttle(mailbox, retry_after=retry_after)

    with pytest.raises(errors.Throttled) as caught:
        graph.send_mail(mailbox, mail())

    assert caught.value.retry_after == (None if seconds is None else timedelta(seconds=seconds))
    assert caught.value.code == "ApplicationThrottled"


def test_a_token_that_is_revoked_is_replaced_unnoticed(graph: GraphClient, simulator: Simulator, mailbox: str) -> None:
    graph.send_mail(mailbox, mail())
    simulator.expire_all_tokens()

    graph.send_mail(mailbox, mail())

    assert len(simulator.deliveries(mailbox)) == 2


@pytest.mark.parametrize(
    ("break_it", "leaf"),
    [
        (Simulator.deny, errors.MailboxDenied),
        (Simulator.unlicense, errors.MailboxUnlicensed),
        (Simulator.remove_mailbox, errors.MailboxUnknown),
    ],
)
def test_a_mailbox_that_cannot_be_used_says_why(
    graph: GraphClient,
    simulator: Simulator,
    mailbox: str,
    break_it: Callable[[Simulator, str], None],
    leaf: type[errors.GraphError],
) -> None:
    break_it(simulator, mailbox)

    with pytest.raises(leaf):
        graph.send_mail(mailbox, mail())


@pytest.mark.parametrize(
    ("change", "leaf"),
    [
        ({"toRecipients": [{"emailAddress": {"address": "not an address"}}]}, errors.InvalidRecipient),
        ({"toRecipients": []}, errors.InvalidRecipient),
        ({"noSuchMember": 1}, errors.InvalidMessage),
        ({"internetMessageHeaders": [{"name": "Subject", "value": "x"}]}, errors.InvalidMessage),
    ],
)
def test_a_bad_message_is_permanently_refused(
    graph: GraphClient, mailbox: str, change: dict[str, Any], leaf: type[errors.GraphError]
) -> None:
    with pytest.raises(leaf) as caught:
        graph.send_mail(mailbox, mail() | change)

    assert isinstance(caught.value, errors.PermanentError)
    assert "not an address" not in f"{caught.value} {caught.value.message}"


def test_a_mime_that_breaks_off_is_noticed(graph: GraphClient, simulator: Simulator, mailbox: str) -> None:
    draft = graph.create_draft(mailbox, mail())
    simulator.break_mime(mailbox, how="truncated")

    with graph.fetch_mime(mailbox, draft.id) as chunks, pytest.raises(errors.ConnectionLost):
        list(chunks)


def test_a_wrong_secret_is_named_by_its_number(simulator: Simulator) -> None:
    with pytest.raises(errors.AuthenticationFailed) as caught:
        TokenSource(simulator.authority, TENANT, APP, secret="wrong").token()

    assert caught.value.aadsts == 7000215


def test_an_application_without_roles_is_missing_them(simulator: Simulator, mailbox: str) -> None:
    simulator.register_app("bare", secret="s", roles=())
    tokens = TokenSource(simulator.authority, TENANT, "bare", secret="s")

    with pytest.raises(errors.MissingRole):
        GraphClient(simulator.graph_base_url, tokens, TIMEOUT, TAG_ID).send_mail(mailbox, mail())


def test_a_ping_tells_the_roles(graph: GraphClient) -> None:
    assert graph.ping() == {"Mail.ReadWrite", "Mail.Send"}


def test_a_server_that_the_ca_bundle_does_not_vouch_for_is_not_talked_to(
    simulator: Simulator, tokens: TokenSource, mailbox: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens.token()
    monkeypatch.delenv("REQUESTS_CA_BUNDLE")
    # By another name, since the bundle was noted for the first one already
    elsewhere = simulator.graph_base_url.replace("//localhost", "//127.0.0.1")
    assert elsewhere != simulator.graph_base_url

    with pytest.raises(errors.ConnectionFailed):
        GraphClient(elsewhere, tokens, TIMEOUT, TAG_ID).send_mail(mailbox, mail())
