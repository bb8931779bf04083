"""Graph's mail API for an application that sends as many mailboxes: one method per call, one error tree for all.

A method makes one call and retries nothing, except that a refused token is replaced once. ``send_mail`` and
``send_draft`` are the two calls that cannot be taken back; they alone raise ``OutcomeUnknown``. All others may be
repeated, at the price that is noted with each. What was sent can be found again through a tag, an extended property
that a message carries.

The client logs nothing; ``on_call`` is told of each request. (urllib3 logs paths, hence addresses, at level DEBUG: keep
the logger ``urllib3`` at INFO.)
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import quote

from graph_client import errors, uploads
from graph_client.auth import roles_in
from graph_client.calls import MAX_REQUEST_BYTES, Calls, OnCall, OnUnknownCode, Request, Tokens, encode, understood
from graph_client.classification import Operation, Reply
from graph_client.records import Answer, Attachment, Found, Message, UploadSession
from graph_client.transport import chunks, origin_of, require_secure

#: Attach up to this in one request, and open an upload session for more. Documented is "under 3 MB" for the one and
#: "3 MB and more" for the other (https://learn.microsoft.com/graph/outlook-large-attachments), without saying which
#: megabyte; users measured that a session takes 2 MiB already and a request as much as 3,145,611 bytes. Where the
#: two overlap, neither answers with its error.
SMALL_ATTACHMENT_BYTES = 3_000_000

#: The JSON around an attachment's base64, with a name of 255 characters of any script.
ATTACH_JSON_BYTES = 1536

_PAGE_SIZE = 100
#: What a query may hold as it is (RFC 3986, section 3.4), but for what separates its parts.
_QUERY_SAFE = "/?:@!$'()*,;"
#: Between two values of which a message may carry either.
_OR = quote(" or ep/value eq ", safe=_QUERY_SAFE)

_SEND_MAIL = Operation("send_mail", target="mailbox", repeatable=False)
_SEND_DRAFT = Operation("send_draft", repeatable=False)
_CREATE_DRAFT = Operation("create_draft", target="mailbox")
_GET_MESSAGE = Operation("get_message")
_DELETE_MESSAGE = Operation("delete_message")
_ATTACH = Operation("attach")
_ATTACHMENTS = Operation("attachments")
_DELETE_ATTACHMENT = Operation("delete_attachment")
_FIND = Operation("find_by_tag", target="mailbox")
_FETCH_MIME = Operation("fetch_mime")

#: With it ids survive moves, and, says one page while another excepts it, the send of a draft. It acts on the
#: request that carries it only, so all do (https://learn.microsoft.com/graph/outlook-immutable-id).
_IMMUTABLE = {"Prefer": 'IdType="ImmutableId"'}
_JSON = {**_IMMUTABLE, "Content-Type": "application/json"}

T = TypeVar("T")


def attach_bytes(size_bytes: int) -> int:
    """Return how long the request at most is in which ``attach`` brings up a file of this size: base64 in JSON."""
    return 4 * -(-size_bytes // 3) + ATTACH_JSON_BYTES


class GraphClient:
    """A client for the mailboxes of one tenant. Any number of threads may use it, each with connections of its own.

    A mailbox is named by an address or a user id. Every method raises the leaves of ``graph_client.errors``; those
    named in a docstring are the ones that need more than their family's treatment.
    """

    def __init__(
        self,
        base_url: str,
        tokens: Tokens,
        timeout: timedelta,
        tag_id: str,
        user_agent: str = "graph-client",
        on_call: OnCall | None = None,
        on_unknown_code: OnUnknownCode | None = None,
    ) -> None:
        """Nothing is contacted yet.

        Args:
            base_url: With the version, as in ``https://graph.microsoft.com/v1.0``.
            timeout: For the connect and for each silence of the peer.
            tag_id: The extended property that ``tagged`` writes, as in ``String {GUID} Name my-id``. One for all
                messages: named properties are a limited resource of a mailbox.
            on_call: Told of every request when it is over; what it raises is dropped.
            on_unknown_code: Told status and code of an answer whose code has no entry in the table.

        Raises:
            InsecureUrl: The URL is plain http to another machine.
        """
        self._base_url = base_url.rstrip("/")
        self._origin = origin_of(self._base_url)
        require_secure(self._origin)
        self._tokens = tokens
        self._tag_id = tag_id
        # Outlook understands the tag in exactly this form, and no other. Quoted here, for it is long.
        tagged = f"singleValueExtendedProperties/Any(ep: ep/id eq {_literal(tag_id)} and ep/value eq "
        self._tagged = f"$select={Message.SELECT}&$top={_PAGE_SIZE}&$filter={quote(tagged, safe=_QUERY_SAFE)}"
        alternatives = f"singleValueExtendedProperties/Any(ep: ep/id eq {_literal(tag_id)} and (ep/value eq "
        expanded = quote(f"singleValueExtendedProperties($filter=id eq {_literal(tag_id)})", safe=_QUERY_SAFE)
        self._tagged_any = (
            f"$select={Message.SELECT}&$expand={expanded}&$top={_PAGE_SIZE}"
            f"&$filter={quote(alternatives, safe=_QUERY_SAFE)}"
        )
        self._refuses_dates = False
        self._refuses_alternatives = False
        self._calls = Calls(tokens, timeout, user_agent, on_call, on_unknown_code)

    # Sending

    def send_mail(self, mailbox: str, message: Mapping[str, Any], *, client_request_id: str | None = None) -> Answer:
        """Send a message at once; a copy is kept in Sent Items. Graph tells no id: tag the message to find it again.

        Args:
            client_request_id: A UUID under which Graph logs the call; a caller who notes it before can have a call
                traced that it did not live to see answered.

        Raises:
            OutcomeUnknown: It may have been sent. Look for the tag before repeating.
        """
        body = encode({"message": message, "saveToSentItems": True})
        url = f"{self._mailbox(mailbox)}/sendMail"
        return _answer(self._post(_SEND_MAIL, mailbox, url, body, client_request_id))

    def create_draft(self, mailbox: str, message: Mapping[str, Any]) -> Message:
        """Store a message as a draft. Repeating leaves another draft: find it by its tag and delete it."""
        reply = self._post(_CREATE_DRAFT, mailbox, f"{self._mailbox(mailbox)}/messages", encode(message))
        return understood(reply, Message.from_graph)

    def send_draft(self, mailbox: str, message_id: str, *, client_request_id: str | None = None) -> Answer:
        """Send a draft.

        Args:
            client_request_id: As for `send_mail`.

        Raises:
            OutcomeUnknown: It may have been sent.
            ItemNotFound: There is no such draft; after an earlier ``send_draft`` it probably was sent.
        """
        url = f"{self._message(mailbox, message_id)}/send"
        return _answer(self._post(_SEND_DRAFT, mailbox, url, b"", client_request_id))

    # Messages

    def get_message(self, mailbox: str, message_id: str) -> Message:
        """Read what a ``Message`` holds, of a draft or of a sent mail."""
        url = f"{self._message(mailbox, message_id)}?$select={Message.SELECT}"
        return understood(self._get(_GET_MESSAGE, mailbox, url), Message.from_graph)

    def delete_message(self, mailbox: str, message_id: str) -> None:
        """Move a message to Deleted Items."""
        self._delete(_DELETE_MESSAGE, mailbox, self._message(mailbox, message_id))

    def tagged(self, message: Mapping[str, Any], value: str) -> dict[str, Any]:
        """Return a copy of the message with the tag added, by which ``find_by_tag`` finds it."""
        properties = [*message.get("singleValueExtendedProperties", ()), {"id": self._tag_id, "value": value}]
        return {**message, "singleValueExtendedProperties": properties}

    def find_by_tag(self, mailbox: str, value: str, since: datetime | None = None) -> Found:
        """Return every message of the mailbox, in any folder, that carries the tag's value (compared without case).

        A message just sent may take seconds, at times minutes, to show: finding nothing proves nothing yet.

        Args:
            since: Leave out messages created earlier, which keeps the search cheap in a full mailbox. A draft has no
                sending date, so creation is what counts; allow for the difference of the clocks. Graph's documents do
                not show the two conditions together: if it refuses them, the date is left out, then and from now on.
        """
        if since is None or self._refuses_dates:
            return self._find_tagged(mailbox, value, "")
        try:
            return self._find_tagged(mailbox, value, _created_since(since))
        except errors.InvalidMessage:
            found = self._find_tagged(mailbox, value, "")
            self._refuses_dates = True  # or each look-up would be two requests from now on
            return found

    def _find_tagged(self, mailbox: str, value: str, further: str) -> Found:
        query = f"{self._tagged}{_quoted_literal(value)}){further}"
        found = Found([], [])
        for messages, request_id in self._pages(
            _FIND, mailbox, f"{self._mailbox(mailbox)}/messages?{query}", Message.from_graph
        ):
            found.messages.extend(messages)
            found.request_ids.extend([request_id] if request_id else [])
        return found

    def find_by_tags(
        self, mailbox: str, values: Sequence[str], since: datetime | None = None
    ) -> dict[str, list[Message]]:
        """Return every message that carries one of these values of the tag, by value; in one request, if Graph can.

        Graph's documents show a filter for one value. If it refuses this one, each value is looked for by itself, then
        and from now on. Which value a message carries it tells itself.
        """
        if self._refuses_alternatives:
            return self._find_each_tagged(mailbox, values, since)
        try:
            return self._find_all_tagged(mailbox, values, since)
        except errors.InvalidMessage:
            found = self._find_each_tagged(mailbox, values, since)
            self._refuses_alternatives = True  # only now: it might have been the mailbox that was refused
            return found

    def requests_to_find(self, values: int) -> int:
        """Return how many requests ``find_by_tags`` makes for so many values, as far as is known by now."""
        return values if self._refuses_alternatives else 1

    def _find_each_tagged(
        self, mailbox: str, values: Sequence[str], since: datetime | None
    ) -> dict[str, list[Message]]:
        return {value: self.find_by_tag(mailbox, value, since).messages for value in values}

    def _find_all_tagged(self, mailbox: str, values: Sequence[str], since: datetime | None) -> dict[str, list[Message]]:
        alternatives = _OR.join(map(_quoted_literal, values))
        query = f"{self._tagged_any}{alternatives})){_created_since(since) if since else ''}"
        wanted = {value.lower(): value for value in values}
        found: dict[str, list[Message]] = {value: [] for value in values}
        url = f"{self._mailbox(mailbox)}/messages?{query}"
        for messages, _ in self._pages(_FIND, mailbox, url, _with_properties):
            for message, carried in messages:
                for value in {wanted[each] for each in carried if each in wanted}:
                    found[value].append(message)
        return found

    @contextmanager
    def fetch_mime(self, mailbox: str, message_id: str) -> Iterator[Iterator[bytes]]:
        """Give the message as RFC 5322 text in chunks of at most ``exchange.PIECE_BYTES``, for the length of the block.

        Exchange writes it anew each time, so two fetches may differ. The iterator raises what a call would; a text that
        it ended without raising is whole.
        """
        url = f"{self._message(mailbox, message_id)}/$value"
        headers = {**_IMMUTABLE, "Accept": "*/*"}
        response = self._calls.open(Request(_FETCH_MIME, mailbox, "GET", url, None, headers))
        try:
            yield chunks(response)
        finally:
            response.close()

    # Attachments

    def attach(
        self,
        mailbox: str,
        message_id: str,
        *,
        name: str,
        content_type: str,
        content: bytes,
        is_inline: bool = False,
        content_id: str | None = None,
    ) -> Attachment:
        """Add an attachment of at most ``SMALL_ATTACHMENT_BYTES`` to a draft.

        After ``ConnectionLost`` it may be there: compare ``attachments`` before repeating, or it is there twice.

        Raises:
            AttachmentTooLarge: It needs an upload session.
        """
        if len(content) * 4 / 3 > MAX_REQUEST_BYTES:
            raise errors.AttachmentTooLarge("an upload session is needed")
        attachment = {
            "@odata.type": "#microsoft.graph.fileAttachment",
            "name": name,
            "contentType": content_type,
            "contentBytes": base64.b64encode(content).decode("ascii"),
            "isInline": is_inline,
        }
        if content_id is not None:
            attachment["contentId"] = content_id
        url = f"{self._message(mailbox, message_id)}/attachments"
        return understood(self._post(_ATTACH, mailbox, url, encode(attachment)), Attachment.from_graph)

    def attachments(self, mailbox: str, message_id: str) -> list[Attachment]:
        """Return a message's attachments, without their contents."""
        url = f"{self._message(mailbox, message_id)}/attachments?$select={Attachment.SELECT}&$top={_PAGE_SIZE}"
        pages = self._pages(_ATTACHMENTS, mailbox, url, Attachment.from_graph)
        return [attachment for attachments, _ in pages for attachment in attachments]

    def delete_attachment(self, mailbox: str, message_id: str, attachment_id: str) -> None:
        """Take an attachment off a draft."""
        url = f"{self._message(mailbox, message_id)}/attachments/{quote(attachment_id, safe='')}"
        self._delete(_DELETE_ATTACHMENT, mailbox, url)

    def create_upload_session(
        self,
        mailbox: str,
        message_id: str,
        *,
        name: str,
        size_bytes: int,
        content_type: str,
        is_inline: bool = False,
        content_id: str | None = None,
    ) -> UploadSession:
        """Open a session to upload an attachment of more than ``SMALL_ATTACHMENT_BYTES`` to a draft.

        A session that is not completed leaves nothing on the draft.

        Raises:
            AttachmentTooSmall: ``attach`` it instead.
            AttachmentTooLarge: It exceeds ``MAX_ATTACHMENT_BYTES``.
            ItemNotFound: There is no such draft, or not yet where the session would be: a moment after
                ``create_draft`` this may pass.
        """
        return uploads.create(
            self._calls,
            mailbox,
            self._message(mailbox, message_id),
            name=name,
            size_bytes=size_bytes,
            content_type=content_type,
            is_inline=is_inline,
            content_id=content_id,
        )

    def upload_range(self, session: UploadSession, offset: int, content: bytes, total_bytes: int) -> int | None:
        """Upload the range that begins at ``offset``; return where the next begins, or None when the file is complete.

        Ranges go in order, each at most ``UPLOAD_RANGE_BYTES`` long and none empty. After ``ConnectionLost`` on the
        last one the attachment may be complete: compare ``attachments`` before a new session, or it is there twice.

        Raises:
            UploadOutOfOrder: Another range is due; ``expected_offset`` says which, if Graph did.
            UploadSessionLost: Begin again with a new session.
        """
        return uploads.upload(self._calls, session, offset, content, total_bytes)

    def cancel_upload(self, session: UploadSession) -> None:
        """Give up a session; one that has ended already is fine too."""
        uploads.cancel(self._calls, session)

    # Checking

    def ping(self) -> frozenset[str] | None:
        """Get a token and return the roles that it names; None when it is opaque. Graph itself is not contacted."""
        return roles_in(self._tokens.token())

    # Below: how a call is put together

    def _mailbox(self, mailbox: str) -> str:
        return f"{self._base_url}/users/{_quoted(mailbox)}"

    def _message(self, mailbox: str, message_id: str) -> str:
        return f"{self._mailbox(mailbox)}/messages/{quote(message_id, safe='')}"

    def _get(self, operation: Operation, mailbox: str, url: str) -> Reply:
        return self._calls.call(Request(operation, mailbox, "GET", url, None, _IMMUTABLE))

    def _post(
        self, operation: Operation, mailbox: str, url: str, body: bytes, client_request_id: str | None = None
    ) -> Reply:
        headers = _JSON if body else _IMMUTABLE
        return self._calls.call(Request(operation, mailbox, "POST", url, body, headers, client_request_id))

    def _delete(self, operation: Operation, mailbox: str, url: str) -> None:
        self._calls.call(Request(operation, mailbox, "DELETE", url, None, _IMMUTABLE))

    def _pages(
        self, operation: Operation, mailbox: str, url: str | None, parse: Callable[[Mapping[str, Any]], T]
    ) -> Iterator[tuple[list[T], str | None]]:
        """Yield each page's items with Graph's id of the request."""
        while url is not None:
            reply = self._get(operation, mailbox, url)
            items, url = understood(reply, lambda body: _page(body, parse))
            if url is not None and origin_of(url) != self._origin:
                raise errors.InsecureUrl("the next page is on another host")
            yield items, reply.request_id


@lru_cache(maxsize=4096)
def _quoted(mailbox: str) -> str:
    return quote(mailbox, safe="@")


def _page(body: Mapping[str, Any], parse: Callable[[Mapping[str, Any]], T]) -> tuple[list[T], str | None]:
    return [parse(item) for item in body["value"]], body.get("@odata.nextLink")


def _answer(reply: Reply) -> Answer:
    return Answer(reply.request_id, reply.client_request_id, datetime.now(UTC))


def _with_properties(body: Mapping[str, Any]) -> tuple[Message, list[str]]:
    """Read a message with the values, in lower case, of the extended properties that were asked for."""
    properties = body.get("singleValueExtendedProperties") or []
    return Message.from_graph(body), [str(each["value"]).lower() for each in properties]


def _literal(text: str) -> str:
    """Write a string as OData does, with quotes doubled."""
    return "'" + text.replace("'", "''") + "'"


def _quoted_literal(text: str) -> str:
    return quote(_literal(text), safe=_QUERY_SAFE)


def _created_since(since: datetime) -> str:
    # Quoted already, as `_OR` is: of a query only the values differ.
    return f"%20and%20createdDateTime%20ge%20{since.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"
