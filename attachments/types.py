"""Whether what a source says of a file's type goes with what the publisher has declared.

Sources know types badly, publishers not much better, and a mail that is refused wrongly is worse than one whose file
has a vague type. So what says nothing goes with everything, and so do several names of one type. What is left is a file
that is plainly another, as a log-in page in the place of a report.
"""

from __future__ import annotations

from attachments.errors import TypeMismatch

#: What servers say when they do not know, and what they say to have a browser save a file.
_SAY_NOTHING = frozenset(
    {
        "application/octet-stream",
        "binary/octet-stream",
        "application/binary",
        "application/unknown",
        "application/download",
        "application/force-download",
        "application/x-download",
        "application/x-force-download",
        "application/x-octet-stream",
        "application/save",
        "application/x-www-form-urlencoded",  # what an HTTP client says that was told nothing
        "text/plain",  # Apache's name for anything that has no other
        # A machine with Office calls by these names old and new documents, and tables of text.
        "application/msword",
        "application/vnd.ms-excel",
        "application/vnd.ms-powerpoint",
    }
)
#: Other names of a type, by what stands behind the slash once an ``x-`` is gone.
_OTHER_NAMES = {
    "jpg": "jpeg",
    "pjpeg": "jpeg",
    "zip-compressed": "zip",
    "gzip-compressed": "gzip",
    "comma-separated-values": "csv",
    "vnd.microsoft.icon": "icon",
    "mpeg3": "mpeg",
    "mp3": "mpeg",
    "wave": "wav",
    "pn-realaudio": "realaudio",
}
#: Office documents, which are archives and may be named so.
_ZIPPED = ("vnd.openxmlformats", "vnd.oasis.opendocument", "vnd.ms-word", "vnd.ms-powerpoint")


def demand_type(origin: str, found: str | None, declared: str | None) -> None:
    """Compare the type of an answer with the declared one; None and what says nothing go with any.

    Raises:
        TypeMismatch: They are of different kinds.
    """
    ours, theirs = _bare(declared), _bare(found)
    if {ours, theirs} & _SAY_NOTHING or "/" not in ours or "/" not in theirs:
        return
    if _kind(ours) != _kind(theirs):
        raise TypeMismatch(f"{origin} has a file of another type than {ours}, which was declared")


def _bare(content_type: str | None) -> str:
    return (content_type or "").partition(";")[0].strip().lower()


def _kind(content_type: str) -> str:
    subtype = content_type.partition("/")[2].removeprefix("x-")
    if subtype.startswith(_ZIPPED):
        return "zip"
    # A type that is built on another's syntax may be named by that: image/svg+xml is XML.
    subtype = subtype.rpartition("+")[2]
    return _OTHER_NAMES.get(subtype, subtype)
