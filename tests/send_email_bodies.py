"""Bodies for ``send_email``: emails at the edges of what is allowed, and emails damaged in every known way.

Both the tests of the contract and those of a whole fleet draw from here, so what one accepts the other has to send.
Every text that stands for content has `MARK` in it: wherever that turns up, content was repeated.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from typing import Any, Literal, NamedTuple

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

import contracts

MARK = "pl4nted"
#: Whom an injected header would send to.
EVE = "eve@evil.example"
INJECTION = f"\r\nBcc: {EVE}\r\nX-Injected: yes"

Email = dict[str, Any]


class Body(NamedTuple):
    """One body and what must become of it."""

    content: bytes
    fate: Literal["sent", "rejected", "either"]
    kind: str

    def __repr__(self) -> str:
        return f"{self.kind}: {len(self.content)} bytes, {self.content[:500]!r}"


# Emails that are valid

_LOCAL_PARTS = [
    f"{MARK}.o'brien",
    f"{MARK}.last+tag+tag",
    f"{MARK}!#$%&'*+/=?^_`{{|}}~-",
    f"{MARK}-".ljust(64, "l"),
    f"{MARK}.0",
    f"-{MARK}-",
    MARK.upper(),
]
_LONG_LABEL = "d" * 63
_DOMAINS = ["a.example", "xn--bcher-kva.example", f"{_LONG_LABEL}.example", f"sub.{_LONG_LABEL}.e", "1.2.3.x4"]

addresses = st.sampled_from([f"{local}@{domain}" for local in _LOCAL_PARTS for domain in _DOMAINS])
_unit = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1, max_size=4)
_units = st.sampled_from(["😀", "é", "e\u0301", "漢", "\u202e", "\u200f", "👩\u200d💻", ' "\\', "</p>", ": ", '" : '])


def _lines(longest: int) -> SearchStrategy[str]:
    """Lines that begin with the mark, often exactly as long as they may be."""
    lengths = st.sampled_from([len(MARK), longest]) | st.integers(len(MARK), longest)
    return st.builds(lambda unit, length: (MARK + unit * length)[:length], _unit | _units, lengths)


@st.composite
def _recipients(draw: DrawFn) -> dict[str, list[str]]:
    """The recipients of one email, at times as many as there may be."""
    count = draw(st.sampled_from([1, 1, 2, 2, 3, 3, 4, 5, 500]))
    pattern = draw(addresses)
    everyone = [f"n{number}.{pattern}" for number in range(count)] if count > 5 else draw(_some(addresses, count))
    first, second = sorted(draw(st.tuples(*[st.integers(0, count)] * 2)))
    return {"to": everyone[:first], "cc": everyone[first:second], "bcc": everyone[second:]}


def _some(strategy: SearchStrategy[Any], count: int) -> SearchStrategy[list[Any]]:
    return st.lists(strategy, min_size=count, max_size=count)


_bodies = st.fixed_dictionaries(
    {
        "contentType": st.sampled_from(["html", "text"]),
        "content": st.builds(
            lambda unit, times: MARK + unit * times,
            _unit | _units | st.sampled_from(["\r\n", "\t", "\u2028", "\x85", "<script>\n.\r\n"]),
            st.sampled_from([0, 1, 500]),
        ),
    }
)
_headers = st.dictionaries(
    st.sampled_from(["x-a", "X-B", "x-" + "c" * 74, "x-1", "X--", "x-mailer"]), _lines(995), max_size=5
)
_metadata = st.dictionaries(
    st.sampled_from(["tenant", "n", f"{MARK} ".ljust(64, "k"), "ключ", "__proto__", "a b", ""]).filter(bool),
    _lines(1024),
    max_size=4,
) | st.dictionaries(
    st.sampled_from(["a", "b", "c"]),
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(-(2**53), 2**53),
)
_optional: dict[str, SearchStrategy[Any]] = {
    "subject": _lines(255) | st.just(""),
    "reply_to": addresses | st.lists(addresses, max_size=10),
    "importance": st.sampled_from(["low", "normal", "high"]),
    "priority": st.sampled_from(["high", "normal", "bulk"]),
    "send_at": st.sampled_from([None, "2020-01-01T00:00:00Z", "1970-01-01T00:00:00.5+00:00", "2024-02-29t23:59:59z"]),
    "expires_at": st.sampled_from([None, "2127-01-01T00:00:00+14:00", "9998-12-31T23:59:59.999Z"]),
    "headers": _headers,
    "metadata": _metadata,
}
_described = st.fixed_dictionaries(
    {"name": _lines(255)},
    optional={
        "contentType": st.sampled_from(["text/plain; charset=utf-8", "application/vnd.a+xml", 'a/b; c="d e"']),
        "is_inline": st.booleans(),
        "content_id": st.sampled_from([None, "logo@mail", "größe.png"]),
    },
)
_ids = st.builds("{}-{}".format, st.just(MARK), st.uuids())


def _file_elsewhere(size_bytes: int) -> str:
    return f"https://files.example/{size_bytes}"


@st.composite
def emails(
    draw: DrawFn,
    ids: SearchStrategy[str] = _ids,
    senders: SearchStrategy[str] = addresses,
    file_url: Callable[[int], str] = _file_elsewhere,
) -> Email:
    """An email that is valid, whatever it looks like.

    Args:
        ids: What the publisher calls it.
        senders: The mailboxes to send from.
        file_url: Where a file of so many bytes is.
    """
    email = {
        "publisher_message_id": draw(ids),
        "from": draw(senders),
        **draw(_recipients()),
        "body": draw(_bodies),
        **draw(st.fixed_dictionaries({}, optional=_optional)),
    }
    if draw(st.integers(0, 9)) == 7:
        sizes = draw(st.lists(st.sampled_from([0, 1, 2500]), min_size=1, max_size=3))
        email["attachments"] = [draw(_described) | {"size": size, "urlOrId": file_url(size)} for size in sizes]
    return email


# What is done to them

_PROTOTYPES = ["__proto__", "constructor", "prototype", "__class__", "$ref", "toString"]
_STRANGE_KEYS = [*_PROTOTYPES, "", " ", "To", "FROM", "to ", "to\x00", f"{MARK} key", "\u202eot", "k" * 100_000]
#: Numbers and words that JSON does not have, or that no 64 bits hold.
_STRANGE_NUMBERS = ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000, "1e-999", "-0", "01", "+1", "0x10"]
_STRANGE_NUMBERS += ["1.", ".5", "1_000", str(2**53 + 1), str(2**63), str(2**64), str(-(2**63) - 1), "undefined"]
_BREAKING = ["\n", "\r", "\r\n", "\x00", "\x0b", "\x1b[31m", "\x7f", "\x85", "\x9f", "\u2028", "\u2029", INJECTION]
_NOT_UTF_8 = [
    b"\xff",
    b"\xc0\x80",
    b"\xc1\xa1",
    b"\xed\xa0\x80",
    b"\xf4\x90\x80\x80",
    b"\xe2\x82",
    b"\x80",
    b"\xfe\xff",
]
_DEPTHS = [200, 300, 999, 1100, 5000, 100_000]
_NOT_ADDRESSES = ["a@b", "a@b..example", ".a@b.example", "a.@b.example", "a@-b.example", "a@b.example.", "@b.example"]
_NOT_ADDRESSES += ["a b@c.example", '"a b"@c.example', "a@[127.0.0.1]", "ä@b.example", "a@ä.example", "a@b@c.example"]
_NOT_ADDRESSES += [f"a@b.example,{EVE}", f"a@b.example;{EVE}", f"{EVE} ", f"Eve <{EVE}>", f"a@b.example>\t<{EVE}"]

_scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
_json = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
_wrong_values: SearchStrategy[Any] = (
    _json
    | st.sampled_from(
        [None, True, 0, -1, 2**70, 0.5, "", [], {}, [[]], [{}], [None], {"": ""}, [MARK], {f"{MARK} key": MARK}]
    )
    | st.builds(lambda size: MARK * size, st.sampled_from([100, 1000, 15_000]))
    | st.builds(
        lambda size, value: [value] * size, st.sampled_from([60, 600, 6000]), st.sampled_from([0, "", {}, MARK])
    )
    | st.builds(lambda size: {f"{MARK} {n}": n for n in range(size)}, st.sampled_from([60, 2000]))
)


class _Twice(dict[str, Any]):
    """An object that is written with one key twice."""

    def __init__(self, members: Mapping[str, Any], key: str, other: Any, *, first: bool) -> None:
        super().__init__(members)
        self._written = [(key, other), *members.items()] if first else [*members.items(), (key, other)]

    def items(self) -> Any:
        return self._written


def _places(email: Email) -> Iterator[tuple[Any, Any]]:
    """Yield each object or list of the email with each of its keys or indices."""
    waiting: list[Any] = [email]
    while waiting:
        each = waiting.pop()
        for key, value in list(each.items() if isinstance(each, dict) else enumerate(each[:3])):
            yield each, key
            if isinstance(value, dict | list):
                waiting.append(value)


def _written(email: Any) -> bytes:
    return json.dumps(email).encode()


def _raw(email: Email, place: tuple[Any, Any], text: str) -> bytes:
    """Write the email with this text, JSON or not, in that place."""
    holder, key = place
    holder[key] = "@place@"
    return _written(email).replace(b'"@place@"', text.encode())


def _cut(draw: DrawFn, email: Email) -> Body:
    content = _written(email)
    return Body(content[: draw(st.integers(0, len(content) - 1))], "rejected", "cut off")


def _flipped(draw: DrawFn, email: Email) -> Body:
    content = bytearray(_written(email))
    for _ in range(draw(st.integers(1, 4))):
        content[draw(st.integers(0, len(content) - 1))] ^= draw(st.sampled_from([1, 2, 4, 8, 16, 32, 64, 128, 255]))
    return Body(bytes(content), "either", "flipped bits")


def _wrong(draw: DrawFn, email: Email) -> Body:
    holder, key = draw(st.sampled_from(list(_places(email))))
    holder[key] = draw(_wrong_values)
    return Body(_written(email), "either", "a wrong value")


def _texts(email: Email) -> list[tuple[Any, Any]]:
    return [(each, key) for each, key in _places(email) if isinstance(each[key], str)]


def _number_for_text(draw: DrawFn, email: Email) -> Body:
    metadata = email.get("metadata")  # where a number is as good
    holder, key = draw(st.sampled_from([place for place in _texts(email) if place[0] is not metadata]))
    holder[key] = draw(st.sampled_from([0, 1, -1, 1.5, True, 2**63, 10**30]))
    return Body(_written(email), "rejected", "a number for a text")


def _strange_number(draw: DrawFn, email: Email) -> Body:
    email["metadata"] = {"n": 0}
    place = draw(st.just((email["metadata"], "n")) | st.sampled_from(list(_places(email))))
    return Body(_raw(email, place, draw(st.sampled_from(_STRANGE_NUMBERS))), "either", "a strange number")


def _not_an_address(draw: DrawFn, email: Email) -> Body:
    field = draw(st.sampled_from(["from", "to", "cc", "bcc", "reply_to"]))
    wrong = draw(st.sampled_from(_NOT_ADDRESSES))
    email[field] = wrong if field == "from" else [*email["to"][:1], wrong]
    return Body(_written(email), "rejected", "not an address")


def _wrong_header(draw: DrawFn, email: Email) -> Body:
    names = draw(
        st.sampled_from([("x-a", "X-A"), ("Bcc", "x-a"), ("x-a: 1\r\nBcc", "x-a"), ("x-", "x-a"), ("x a", "x-a")])
    )
    email["headers"] = dict.fromkeys(names, MARK)
    return Body(_written(email), "rejected", "headers that may not be")


def _injected(draw: DrawFn, email: Email) -> Body:
    """Put what breaks a line into a line."""
    lines = [(each, key) for each, key in _texts(email) if key != "content"]
    holder, key = draw(st.sampled_from(lines))
    text, at = holder[key], draw(st.sampled_from([0, 3, 9999]))
    holder[key] = text[:at] + draw(st.sampled_from(_BREAKING)) + text[at:]
    return Body(_written(email), "rejected", "an injected line")


def _surrogate(draw: DrawFn, email: Email) -> Body:
    holder, key = draw(st.sampled_from(_texts(email)))
    holder[key] += draw(st.sampled_from(["\ud800", "\udfff", "\udc00\ud800"]))
    return Body(_written(email), "rejected", "half a surrogate pair")


def _nested(draw: DrawFn, email: Email) -> Body:
    before, after = draw(st.sampled_from([("[", "]"), ('{"a":', "}"), ('[{"to":', "}]")]))
    depth = draw(st.sampled_from(_DEPTHS))
    text = before * depth + "1" + after * depth
    place = draw(st.sampled_from([*_places(email), None]))
    return Body(text.encode() if place is None else _raw(email, place, text), "rejected", "deep nesting")


def _repeated(draw: DrawFn, email: Email) -> Body:
    """Give a key twice: in the email, in its body, in an attachment, in headers or metadata."""
    places = [(each, key) for each, key in _places(email) if isinstance(each, dict)]
    holder, key = draw(st.sampled_from(places))
    value: Any = draw(st.just(holder[key]) | st.just([EVE]) | st.sampled_from([None, "", 0, {}]))
    twice = _Twice(holder, key, value, first=draw(st.booleans()))
    whole = twice if holder is email else _replaced(email, holder, twice)
    return Body(_written(whole), "rejected", "a repeated key")


def _replaced(email: Email, old: Any, new: Any) -> Email:
    for holder, key in list(_places(email)):
        if holder[key] is old:
            holder[key] = new
    return email


def _strange_key(draw: DrawFn, email: Email) -> Body:
    holders = [email, email["body"], *email.get("attachments", [])]
    draw(st.sampled_from(holders))[draw(st.sampled_from(_STRANGE_KEYS))] = draw(_wrong_values)
    return Body(_written(email), "rejected", "a strange key")


def _misencoded(draw: DrawFn, email: Email) -> Body:
    """Put bytes that are not UTF-8 into a text."""
    content = _raw(email, draw(st.sampled_from(_texts(email))), '"@"')
    return Body(content.replace(b'"@"', b'"' + draw(st.sampled_from(_NOT_UTF_8)) + b'"'), "rejected", "not UTF-8")


def _recoded(draw: DrawFn, email: Email) -> Body:
    encoding = draw(st.sampled_from(["utf-16", "utf-32", "utf-8-sig", "utf-16-le", "cp037"]))
    return Body(json.dumps(email).encode(encoding), "rejected", "another encoding")


def _wrapped(draw: DrawFn, email: Email) -> Body:
    """Write the email as something that merely contains it, or as JSON with a slip."""
    content = _written(email)
    slips = [
        _written([email]),
        _written(content.decode()),
        content + content,
        content + b"\x00",
        content[:-1] + b",}",
        content.replace(b'"', b"'"),
        b"//\n" + content,
        b"callback(" + content + b")",
    ]
    return Body(draw(st.sampled_from(slips)), "rejected", "wrapped")


def _without(draw: DrawFn, email: Email) -> Body:
    holder, key = draw(st.sampled_from(list(_places(email))))
    del holder[key]
    return Body(_written(email), "either", "something left out")


_DAMAGES = [_cut, _flipped, _wrong, _number_for_text, _strange_number, _injected, _surrogate, _nested, _repeated]
_DAMAGES += [_not_an_address, _wrong_header, _strange_key, _misencoded, _recoded, _wrapped, _without]

#: What is not even meant to be an email.
_noise: SearchStrategy[bytes] = st.binary(max_size=200) | st.builds(_written, _json)
_writers: SearchStrategy[Callable[[Email], bytes]] = st.sampled_from(
    [
        _written,
        lambda email: json.dumps(email, ensure_ascii=False, indent="\t").encode(),
        lambda email: json.dumps(email, separators=(" ,\n", " :\r\n")).encode(),
    ]
)


@st.composite
def bodies(draw: DrawFn, whole: SearchStrategy[Email]) -> list[Body]:
    """An email and, with ids of their own, as many others as there are ways to damage it; and noise."""
    email = draw(whole)
    drawn = [Body(draw(_writers)(email), "sent", "intact"), Body(draw(_noise), "rejected", "noise")]
    for damage in _DAMAGES:
        other = deepcopy(email) | {"publisher_message_id": email["publisher_message_id"] + damage.__name__}
        drawn.append(damage(draw, other))
    return drawn


# Bodies that are as large as they may be, for whoever wants to see what they cost


def _compact(email: Any) -> bytes:
    return json.dumps(email, separators=(",", ":")).encode()


def _list_of(value: bytes) -> bytes:
    return b"[" + b",".join([value] * ((contracts.MAX_DELIVERY_BYTES - 1000) // (len(value) + 1))) + b"]"


def _large_objects(email: Email) -> Iterator[bytes]:
    """Yield an email with hundreds of thousands of members in each place that takes an object."""
    members: dict[str, list[Any]] = {f"{number:x}": [] for number in range(350_000)}
    for field in ("headers", "metadata", "body"):
        yield _compact(email | {field: members})
    yield _compact(email | members)
    yield _compact(email | {"attachments": [dict.fromkeys(list(members)[:7000])] * 50})


def largest_rejected(email: Email) -> list[bytes]:
    """Bodies of about four megabytes that are rejected and cost most on the way there."""
    objects = _list_of(b'{"":0}')
    return [
        _list_of(b"[]"),
        _list_of(b"0"),
        objects,
        _compact(email | {"to": "@"}).replace(b'"@"', objects),
        b'{"to":' + objects + b"," + _compact(email)[1:],  # hidden by the second
        *_large_objects(email),
        b"[" * 2_000_000 + b"]" * 2_000_000,
        b'"' + b"\\u0000" * 600_000 + b'"',
        _compact(email | {"body": {"contentType": "text", "content": MARK * 600_000}}),
    ]


def largest_sent(email: Email) -> list[bytes]:
    """Bodies of emails whose text is as long as it may be."""
    texts = [
        MARK.ljust(contracts.MAX_BODY_BYTES, "x"),
        MARK + "😀" * ((contracts.MAX_BODY_BYTES - len(MARK)) // 4),
        (MARK + '"\\\n' * 640_000)[:1_900_000],
    ]
    numbered = [email | {"publisher_message_id": f"{MARK}-largest-{number}"} for number in range(len(texts))]
    return [
        json.dumps(each | {"body": {"contentType": "html", "content": text}}, ensure_ascii=False).encode()
        for each, text in zip(numbered, texts, strict=True)
    ]
