"""Everything that the simulator remembers, in one place that can be wiped."""

from __future__ import annotations

from pathlib import Path

from . import errors
from .behaviour import Behaviour
from .contents import ContentStore
from .faults import FaultPlan
from .journal import Journal
from .mailboxes import Mailbox
from .throttling import Throttle
from .tokens import Authority
from .uploads import UploadSessions


class World:
    def __init__(self, folder: Path, client_id: str, secret: str) -> None:
        self._client_id, self._secret = client_id, secret
        self.contents = ContentStore(folder / "contents")
        self.faults = FaultPlan()
        self._begin()

    def reset(self) -> None:
        """Forget everything, as if just started; calls that are held are let go."""
        self.faults.release()
        self.contents.clear()
        self.faults = FaultPlan()
        self._begin()

    def mailbox(self, address: str) -> Mailbox:
        """Return the mailbox of that address, which comes into being when it is first named.

        Raises:
            GraphError: There can be none, or it refuses all calls at present.
        """
        mailbox = self.mailbox_to_configure(address)
        if mailbox.refusal is not None:
            raise mailbox.refusal
        return mailbox

    def mailbox_to_configure(self, address: str) -> Mailbox:
        """Return the mailbox even if it refuses calls."""
        key = address.lower()
        mailbox = self.mailboxes.get(key)
        if mailbox is None:
            if not self._can_exist(key):
                raise errors.invalid_user(address)
            mailbox = self.mailboxes[key] = Mailbox(key, self.behaviour)
        return mailbox

    def _begin(self) -> None:
        self.behaviour = Behaviour()
        self.authority = Authority(self.behaviour, self._client_id, self._secret)
        self.throttle = Throttle()
        self.journal = Journal()
        self.uploads = UploadSessions()
        self.mailboxes: dict[str, Mailbox] = {}

    def _can_exist(self, address: str) -> bool:
        user, _, domain = address.partition("@")
        return bool(user and domain) and domain not in self.behaviour.unknown_domains
