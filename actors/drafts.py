"""From a claimed email to a draft in the mailbox with every attachment on it.

Recovery points, each committed under the email's lease before the next step: the draft's id; for each attachment its
upload session and how far it has got; that it is up. What Graph did but nobody recorded is found again: the draft by
the email's tag, an attachment by looking at the draft.

A request to attach a file may take effect long after nobody waits for it any more, and then the file would be there
twice. So that the request is made is committed before it is made; where no answer was recorded and the file is not on
the draft, the draft is given up for another, and what comes late comes to nothing; or, if much is on it already, it is
waited for as long as a request may take effect. Small files go first, in their order: by the time a large one is up
none of them is in that state. At the end every draft is compared with what should be on it.

Where the worker may die, and what the next claimant does once the lease has run out:

* ``draft.created``, before its id is recorded: finds the draft by the tag. ``draft.recorded``: has its id.
* ``attachment.begun``, before or during the request: sees it on the draft, or makes another draft, or waits until it
  can take effect no more and goes on with this one.
* ``attachment.attached``, before it is recorded: sees it on the draft. ``upload.recorded``: goes on with the next.
* ``session.created``, before its address is recorded: opens another; the first leaves nothing on the draft.
* ``session.recorded``, ``range.recorded``: goes on in the session, where it was.
* ``range.uploaded``, before it is recorded: Graph refuses the range and says where to go on; where it does not, the
  file begins anew in another session.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import runtime
from actors.composition import attached_bytes, file_name, graph_message, size_of
from actors.evidence import looked_up
from actors.graph_calls import graph_call
from actors.outcomes import FileInDoubt
from actors.uploaders import bring_up_all, look
from actors.waiting import CLOCKS_DIFFER
from attachments import AttachmentStream, SourceChanged, SourceUnavailable, source_of
from crash_points import CrashPoint
from graph_client import SMALL_ATTACHMENT_BYTES, UPLOAD_RANGE_BYTES, Message, UploadSession, attach_bytes
from graph_client.errors import (
    AttachmentTooLarge,
    AttachmentTooSmall,
    ConnectionLost,
    GraphError,
    MessageTooLarge,
    ServerUnavailable,
    TransientError,
    UploadOutOfOrder,
    UploadSessionLost,
)
from limiter import Refused
from models import ClaimedEmail, uploads
from models.uploads import Upload
from settings import LEASE_MARGIN
from telemetry import UPLOADED_BYTES, Step, mail_log, note_ids

#: Between two pieces the lease is looked at; from a slow source a piece is what has come.
_PIECE_BYTES = 64 * 1024
#: Of one mail; a mailbox has four slots, and other mail and its backups need one.
_FILES_AT_A_TIME = 3
#: So many are brought up again rather than waited for.
_FEW_FILES = 3
#: 502 and 504 tell that a gateway got no answer, not that there will be none; 500 and 503 come from who has ended.
_GATEWAYS = (502, 504)


class AttachmentsIncomplete(TransientError):
    """Raised when the draft lacks attachments although Graph has taken them."""


class AlreadySent(Exception):
    """Raised when the search for a draft finds the sent mail: it showed itself later than the grace period."""

    def __init__(self, message: Message, evidence: dict[str, Any]) -> None:
        super().__init__("the mail was found sent")
        self.message = message
        self.evidence = evidence


def prepare_draft(email: ClaimedEmail) -> str:
    """Return the id of a draft that lacks nothing but being sent.

    Raises what Graph, the limiter and the attachments' sources raise; what was done until then is kept.
    """
    if attached_bytes(email.payload) > runtime.configuration.message_max_mb * 1024 * 1024:
        raise MessageTooLarge
    begun_before = email.attempt > 1 or email.draft_id is not None
    draft_id = email.draft_id or _first_draft(email, begun_before)
    if not email.payload.get("attachments"):
        return draft_id
    planned = _plan(email)
    if begun_before:
        _find_unrecorded(email, draft_id, planned)
        if _may_change(planned):
            draft_id = _another_draft(email, draft_id)
            planned = _plan(email)
    _attach_all(email, draft_id, planned)
    _compare(email, draft_id, planned)
    return draft_id


def _plan(email: ClaimedEmail) -> list[Upload]:
    """Return the email's uploads as they are made: the small ones first, each kind in the email's order."""
    planned = uploads.plan(email, email.payload["attachments"])
    for upload in planned:
        upload.filename = file_name(upload.filename)  # as it is on the draft
    return sorted(planned, key=_is_large)


def _may_change(planned: list[Upload]) -> bool:
    """Say whether a file may still appear on the draft that an earlier attempt asked for and never heard of.

    Raises:
        FileInDoubt: It may, and so much is on the draft that waiting is better than another.
    """
    waits = [upload.attaching_for for upload in planned if upload.attaching_for is not None]
    left = runtime.configuration.in_doubt_grace - min(waits, default=runtime.configuration.in_doubt_grace)
    if left <= timedelta():
        return False
    if sum(upload.uploaded for upload in planned) > _FEW_FILES:
        raise FileInDoubt(left)
    return True


def _is_large(upload: Upload) -> bool:
    return upload.size > SMALL_ATTACHMENT_BYTES


def _attach_all(email: ClaimedEmail, draft_id: str, planned: list[Upload]) -> None:
    """Bring up what is not up yet: small files one after the other, then several large ones at a time."""

    def bring_up(upload: Upload) -> None:
        _upload(email, draft_id, upload, email.payload["attachments"][upload.position])

    pending = [upload for upload in planned if not upload.uploaded]
    large = [upload for upload in pending if _is_large(upload)]
    for small in pending[: len(pending) - len(large)]:
        bring_up(small)
    bring_up_all(large, bring_up, at_a_time=_at_a_time(large), keep=lambda: _keep(email))
    if missing := sum(not upload.uploaded for upload in planned):
        raise AttachmentsIncomplete(f"{missing} attachments were not brought up")


def _at_a_time(large: list[Upload]) -> int:
    """Return how many files go at a time: another thread's connections are worth it for a few requests, not for one."""
    requests = sum(-(-(upload.size - upload.uploaded_bytes) // UPLOAD_RANGE_BYTES) for upload in large)
    return max(1, min(_FILES_AT_A_TIME, requests // 2))


def _keep(email: ClaimedEmail) -> None:
    configuration = runtime.configuration
    email.ensure_held(at_least=configuration.graph_timeout + LEASE_MARGIN, lease=configuration.lease)


def _first_draft(email: ClaimedEmail, begun_before: bool) -> str:
    orphan = _find_orphan(email) if begun_before else None
    return _recorded(email, orphan or _create_draft(email), email.record_draft)


def _another_draft(email: ClaimedEmail, given_up: str) -> str:
    """Make a draft in the place of one on which a file may still appear; nobody sends that one."""
    draft_id = _recorded(email, _create_draft(email), email.start_over)
    with suppress(GraphError, Refused), graph_call(email):  # or it is tidied away later
        runtime.graph.delete_message(email.mailbox, given_up)
    return draft_id


def _create_draft(email: ClaimedEmail) -> str:
    message = graph_message(email.id, email.payload)
    with graph_call(email, upload_bytes=size_of(message)):
        return runtime.graph.create_draft(email.mailbox, message).id


def _recorded(email: ClaimedEmail, draft_id: str, record: Callable[[str], None]) -> str:
    runtime.crash_point(CrashPoint.DRAFT_CREATED)
    record(draft_id)
    note_ids(graph_message_id=draft_id)
    runtime.crash_point(CrashPoint.DRAFT_RECORDED)
    mail_log(Step.DRAFTED, incoming_email_id=email.id)
    return draft_id


def _find_orphan(email: ClaimedEmail) -> str | None:
    """Find the draft that an earlier attempt made without living to record it."""
    with graph_call(email):
        found = runtime.graph.find_by_tag(email.mailbox, email.id, since=email.created_at - CLOCKS_DIFFER)
    sent = [message for message in found.messages if not message.is_draft]
    drafts = [message.id for message in found.messages if message.is_draft]
    if sent:
        raise AlreadySent(sent[0], looked_up(found, sent=len(sent), drafts=len(drafts)))
    return drafts[0] if drafts else None


def _find_unrecorded(email: ClaimedEmail, draft_id: str, planned: list[Upload]) -> None:
    """Note attachments that are on the draft already although nobody recorded it, so that none is there twice."""
    if all(upload.uploaded for upload in planned):
        return
    with graph_call(email):
        attached = Counter(attachment.name for attachment in runtime.graph.attachments(email.mailbox, draft_id))
    attached.subtract(upload.filename for upload in planned if upload.uploaded)
    for upload in planned:
        if not upload.uploaded and attached[upload.filename] > 0:
            attached[upload.filename] -= 1
            _record_uploaded(email, upload)


def _compare(email: ClaimedEmail, draft_id: str, planned: list[Upload]) -> None:
    """Take off what is there twice, and learn what is missing.

    Files of one name are alike only if the mail has one of them; of several nobody can tell which is missing or there
    twice, so all of that name are brought up again. Graph may call a file otherwise than we did: it is neither twice
    nor missing as long as the numbers agree.

    Raises:
        AttachmentsIncomplete: Something is missing; the next attempt brings it up again.
    """
    with graph_call(email):
        attached = runtime.graph.attachments(email.mailbox, draft_id)
    wanted = Counter(upload.filename for upload in planned)
    there = {name: [each for each in attached if each.name == name] for name in wanted}
    renamed = [each for each in attached if each.name not in wanted]
    lacking = {name: count - len(there[name]) for name, count in wanted.items() if len(there[name]) < count}
    again = {name for name, count in wanted.items() if len(there[name]) > count > 1}
    surplus = [each for name, count in wanted.items() if count == 1 for each in there[name][1:]]
    if sum(lacking.values()) != len(renamed):
        again |= lacking.keys()
        surplus += renamed
    surplus += [each for name in again if wanted[name] > 1 for each in there[name]]
    for attachment in surplus:
        with graph_call(email):
            runtime.graph.delete_attachment(email.mailbox, draft_id, attachment.id)
    if again:
        _bring_up_again(email, [upload for upload in planned if upload.filename in again])


def _bring_up_again(email: ClaimedEmail, lost: list[Upload]) -> None:
    for upload in lost:
        upload.uploaded = False
        _go_on_at(email, upload, None)
    raise AttachmentsIncomplete(f"{len(lost)} attachments that were brought up cannot be told on the draft")


def _upload(email: ClaimedEmail, draft_id: str, upload: Upload, attachment: dict[str, Any]) -> None:
    """Bring one attachment up; where the boundary between the two ways lies is not documented exactly."""
    if upload.size <= SMALL_ATTACHMENT_BYTES:
        try:
            _attach(email, draft_id, upload, attachment)
        except AttachmentTooLarge:
            _upload_in_ranges(email, draft_id, upload, attachment)
    else:
        try:
            _upload_in_ranges(email, draft_id, upload, attachment)
        except AttachmentTooSmall:
            _attach(email, draft_id, upload, attachment)
    _record_uploaded(email, upload)


def _record_uploaded(email: ClaimedEmail, upload: Upload) -> None:
    runtime.crash_point(CrashPoint.ATTACHMENT_ATTACHED)
    upload.uploaded, upload.attaching_for, upload.uploaded_bytes = True, None, upload.size
    uploads.record_progress(email, upload, lease=runtime.configuration.lease)
    runtime.crash_point(CrashPoint.UPLOAD_RECORDED)
    mail_log(Step.UPLOADED, incoming_email_id=email.id, position=upload.position, bytes=upload.size)


def _attach(email: ClaimedEmail, draft_id: str, upload: Upload, attachment: dict[str, Any]) -> None:
    with runtime.source.open(
        source_of(attachment),
        declared_size=upload.size,
        declared_type=attachment.get("contentType"),
        waiting=lambda: _keep(email),
    ) as stream:
        content = _read(email, stream, upload.size)
    with graph_call(email, upload_bytes=attach_bytes(len(content))):
        _note_attaching(email, upload, timedelta())
        runtime.crash_point(CrashPoint.ATTACHMENT_BEGUN)
        try:
            runtime.graph.attach(email.mailbox, draft_id, content=content, **_described(attachment))
        except (GraphError, Refused) as error:
            if not _may_take_effect_later(error):
                _note_attaching(email, upload, None)
            raise
    UPLOADED_BYTES.labels("request").inc(len(content))


def _note_attaching(email: ClaimedEmail, upload: Upload, attaching_for: timedelta | None) -> None:
    upload.attaching_for, upload.session_url, upload.uploaded_bytes = attaching_for, None, 0
    uploads.record_progress(email, upload, lease=runtime.configuration.lease)


def _may_take_effect_later(error: GraphError | Refused) -> bool:
    """Say whether Graph may still be at work on a request: nobody has answered, or a gateway in its place."""
    return isinstance(error, ConnectionLost) or (isinstance(error, ServerUnavailable) and error.status in _GATEWAYS)


def _upload_in_ranges(email: ClaimedEmail, draft_id: str, upload: Upload, attachment: dict[str, Any]) -> None:
    session = _session(email, draft_id, upload, attachment)
    try:
        _stream(email, session, upload, attachment)
    except UploadOutOfOrder as error:
        # Graph took a range of which nobody lived to hear: the next attempt goes on where Graph wants to. Of which
        # version of the file it took the first one is not known: then it begins anew.
        known = upload.uploaded_bytes > 0 or upload.source_version is None
        _go_on_at(email, upload, error.expected_offset if known else None)
        raise
    except UploadSessionLost:
        _go_on_at(email, upload, None)
        raise
    except SourceChanged:
        # What is up is of another file than the rest would be: the next attempt begins at the first byte.
        _go_on_at(email, upload, None)
        _cancel(email, session)
        raise


def _stream(email: ClaimedEmail, session: UploadSession, upload: Upload, attachment: dict[str, Any]) -> None:
    """Have the bytes flow from the source to the session; a source that breaks off is asked for the rest at once.

    Raises:
        SourceUnavailable: It gave less than a range since it was asked last, or does not tell one version of its file
            from another.
    """
    while True:
        began_at = upload.uploaded_bytes
        try:
            with runtime.source.open(
                source_of(attachment),
                declared_size=upload.size,
                declared_type=attachment.get("contentType"),
                offset=began_at,
                version=upload.source_version if began_at else None,
                waiting=lambda: _go_on(email),
            ) as stream:
                upload.source_version = stream.version
                return _send_ranges(email, session, upload, stream)
        except SourceChanged:
            raise
        except SourceUnavailable as broken:
            if upload.uploaded_bytes == began_at or broken.retry_after or upload.source_version is None:
                raise


def _cancel(email: ClaimedEmail, session: UploadSession) -> None:
    """Give a session up at once; if that fails it ends by itself, and leaves nothing on the draft."""
    with suppress(GraphError, Refused), graph_call(email):
        runtime.graph.cancel_upload(session)


def _go_on_at(email: ClaimedEmail, upload: Upload, offset: int | None) -> None:
    """Have the next attempt go on there in the same session; None: at the first byte, in a new one."""
    if offset is None:
        upload.session_url = upload.source_version = None
    upload.uploaded_bytes = offset or 0
    uploads.record_progress(email, upload, lease=runtime.configuration.lease)


def _send_ranges(email: ClaimedEmail, session: UploadSession, upload: Upload, stream: AttachmentStream) -> None:
    while content := _read(email, stream, UPLOAD_RANGE_BYTES):
        with graph_call(email, upload_bytes=len(content)):
            following = runtime.graph.upload_range(session, upload.uploaded_bytes, content, upload.size)
        runtime.crash_point(CrashPoint.RANGE_UPLOADED)
        sent = upload.uploaded_bytes + len(content)
        if following is None and sent == upload.size:
            UPLOADED_BYTES.labels("range").inc(len(content))
            return
        if following != sent:
            raise UploadOutOfOrder("Graph expects another range than the next")
        upload.uploaded_bytes = following
        uploads.record_progress(email, upload, lease=runtime.configuration.lease)
        runtime.crash_point(CrashPoint.RANGE_RECORDED)
        UPLOADED_BYTES.labels("range").inc(len(content))
        mail_log(Step.UPLOADING, incoming_email_id=email.id, position=upload.position, bytes=following, of=upload.size)
        look()
    raise UploadSessionLost("the file is up and Graph still waits")


def _read(email: ClaimedEmail, stream: AttachmentStream, size_bytes: int) -> bytes:
    """Read so much, or what is left, keeping the lease while a slow source drips."""
    read = bytearray()  # a source may give a byte at a time, and each would be an object
    while len(read) < size_bytes and (piece := stream.receive(min(size_bytes - len(read), _PIECE_BYTES))):
        read += piece
        _go_on(email)
    return bytes(read)


def _go_on(email: ClaimedEmail) -> None:
    look()
    _keep(email)


def _session(email: ClaimedEmail, draft_id: str, upload: Upload, attachment: dict[str, Any]) -> UploadSession:
    """Go on with the session of an earlier attempt while it lives, or open one.

    What it has of a source that names no version might be of another file than the rest would be.
    """
    if upload.session_url and upload.session_expires_at and upload.session_expires_at > datetime.now(UTC):
        known = UploadSession(
            email.mailbox, upload.session_url, upload.session_expires_at, next_offset=upload.uploaded_bytes
        )
        if upload.uploaded_bytes == 0 or upload.source_version is not None:
            return known
        _cancel(email, known)
    with graph_call(email):
        session = runtime.graph.create_upload_session(
            email.mailbox, draft_id, size_bytes=upload.size, **_described(attachment)
        )
    runtime.crash_point(CrashPoint.SESSION_CREATED)
    upload.session_url, upload.session_expires_at, upload.uploaded_bytes = session.url, session.expires_at, 0
    uploads.record_progress(email, upload, lease=runtime.configuration.lease)
    runtime.crash_point(CrashPoint.SESSION_RECORDED)
    return session


def _described(attachment: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": file_name(attachment["name"]),
        "content_type": attachment.get("contentType", "application/octet-stream"),
        "is_inline": attachment.get("is_inline", False),
        "content_id": attachment.get("content_id"),
    }
