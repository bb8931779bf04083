"""Properties that RabbitMQ carries and that nobody should have to expect, headers that pika cannot read among them."""

from __future__ import annotations

import struct
from typing import Any

import pika


def _text(text: bytes) -> bytes:
    return bytes([len(text)]) + text


def _nested(depth: int, kind: bytes) -> bytes:
    """A table in a table, or a list in a list, so deep: each begins with its length, a table's members with a name."""
    name = _text(b"") if kind == b"F" else b""
    level_bytes = len(name + kind) + 4
    levels = (name + kind + struct.pack(">I", inner * level_bytes) for inner in reversed(range(depth)))
    return (b"" if name else _text(b"")) + b"".join(levels)


class RawHeaders(pika.BasicProperties):
    """Properties whose table of headers is given as it is to be sent."""

    def __init__(self, table: bytes, **properties: Any) -> None:
        super().__init__(delivery_mode=2, headers={}, **properties)
        self._table = table

    def encode(self) -> list[bytes]:
        encoded = b"".join(super().encode())
        at = encoded.index(bytes(4), 2)  # the empty table
        return [encoded[:at], struct.pack(">I", len(self._table)), self._table, encoded[at + 4 :]]


_MILLISECONDS = struct.pack(">Q", 1_800_000_000_000)
STRANGE_PROPERTIES: dict[str, pika.BasicProperties] = {
    "a timestamp in milliseconds": RawHeaders(_text(b"sent") + b"T" + _MILLISECONDS),
    "the last timestamp": RawHeaders(_text(b"sent") + b"T" + b"\xff" * 8, content_type="a/b", content_encoding="c"),
    "tables 1,000 deep": RawHeaders(_nested(1000, b"F")),
    "tables 5,000 deep": RawHeaders(_nested(5000, b"F")),
    "lists 5,000 deep": RawHeaders(_nested(5000, b"A")),
    "a table as traceparent": RawHeaders(_text(b"traceparent") + b"F" + bytes(4)),
    "a smallest decimal": RawHeaders(_text(b"x") + b"D\xff" + struct.pack(">i", -5)),
    "a name that is no text": RawHeaders(_text(b"\xff\xfe") + b"t\x01"),
    "two traceparents": RawHeaders((_text(b"traceparent") + b"t\x01") * 2),
    "15,000 headers": pika.BasicProperties(headers={str(number): True for number in range(15_000)}),
    "a long header": pika.BasicProperties(headers={"x": "y" * 120_000}),
    "a list as traceparent": pika.BasicProperties(headers={"traceparent": [1, {"a": None}]}),
    "headers that RabbitMQ makes": pika.BasicProperties(headers={"x-death": 5, "x-delivery-count": "many"}),
    "longest texts": pika.BasicProperties(
        correlation_id="ä" * 127, message_id="m" * 255, type="t" * 255, app_id="a" * 255, reply_to="r" * 255
    ),
    "texts that are none": pika.BasicProperties(correlation_id=b"\xff" * 255, reply_to=b"\x00", type=b"\xff"),
    "a reply to a pseudo-queue": pika.BasicProperties(reply_to="amq.rabbitmq.reply-to.x"),
    "numbers": pika.BasicProperties(priority=255, timestamp=2**64 - 1, expiration="4294967295", delivery_mode=1),
}
