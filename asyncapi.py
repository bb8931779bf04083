"""The AsyncAPI document of what publishers say and hear, made from `contracts`: ``python -m asyncapi``.

It describes RabbitMQ as publishers see it: the queue that takes ``SendEmail``, and the exchange that tells what became
of it. https://www.asyncapi.com/docs/reference/specification/v3.0.0
"""

from __future__ import annotations

from typing import Any

import orjson

import contracts
import notices
from contracts import EventType, SendEmail

_REFERENCES = "#/components/schemas/{model}"
#: What else these events say.
_REASONED = {
    "reason": {"type": "string", "description": "A word by which such failures are grouped."},
    "detail": {"type": "string", "description": "What was wrong, in a sentence for people."},
}
_SUMMARIES = {
    EventType.RECEIVED: "It is stored, and will be sent once.",
    EventType.SENT: "Graph has accepted it.",
    EventType.FAILED: "It was given up; an operator may replay it.",
    EventType.REJECTED: "It was not accepted; nothing was stored.",
    EventType.EXPIRED: "`expires_at` had come before it could be sent.",
    EventType.CANCELLED: "An operator has cancelled it.",
}


_EVENTS_EXCHANGE = {"amqp": {"is": "routingKey", "exchange": {"name": "mail.events", "type": "topic", "durable": True}}}


def document() -> dict[str, Any]:
    """Return the document."""
    email = SendEmail.model_json_schema(by_alias=True, ref_template=_REFERENCES)
    schemas = email.pop("$defs")
    events = {type.value: event_schema(type) for type in EventType}
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "mailfleet",
            "version": contracts.__version__,
            "description": "Mail to be sent, and what became of it.",
            "license": {"name": "Apache 2.0"},
        },
        "defaultContentType": "application/json",
        "channels": {
            "sendEmail": {
                "address": "send_email",
                "description": "A durable queue, reached through the default exchange.",
                "messages": {"SendEmail": {"$ref": "#/components/messages/SendEmail"}},
                "bindings": {"amqp": {"is": "queue", "queue": {"name": "send_email", "durable": True}}},
            },
            "mailEvents": {
                "address": "email.{status}",
                "description": "The topic exchange `mail.events`. A queue that `reply_to` names gets its own copy.",
                "parameters": {"status": {"enum": [type.status for type in EventType]}},
                "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in events},
                "bindings": _EVENTS_EXCHANGE,
            },
            "deadLetters": {
                "address": notices.ROUTING_KEY,
                "description": "For operators, on the same exchange: what `email.*` is bound to does not get it.",
                "messages": {notices.TYPE: {"$ref": f"#/components/messages/{notices.TYPE}"}},
                "bindings": _EVENTS_EXCHANGE,
            },
        },
        "operations": {
            "sendEmail": {"action": "receive", "channel": {"$ref": "#/channels/sendEmail"}},
            "tellWhatBecameOfIt": {"action": "send", "channel": {"$ref": "#/channels/mailEvents"}},
            "tellOfDeadLetters": {"action": "send", "channel": {"$ref": "#/channels/deadLetters"}},
        },
        "components": {
            "messages": {
                "SendEmail": _email_message(),
                **{type.value: _event_message(type) for type in EventType},
                notices.TYPE: _notice_message(),
            },
            "schemas": {**schemas, "SendEmail": email, **events, notices.TYPE: notice_schema()},
        },
    }


def event_schema(type: EventType) -> dict[str, Any]:
    """Return the JSON Schema of an event's body."""
    id = {"type": ["string", "null"]} if type is EventType.REJECTED else {"type": "string"}
    properties: dict[str, Any] = {
        "publisher_message_id": id,
        "incoming_email_id": {**id, "format": "uuid"},
        f"{type.status}_at": {"type": "string", "format": "date-time"},
        "status": {"const": type.status},
    }
    if type in (EventType.FAILED, EventType.REJECTED):
        properties |= _REASONED
    # Fields may be added: who reads an event must ignore what it does not know.
    return {"type": "object", "properties": properties, "required": [*properties]}


def notice_schema() -> dict[str, Any]:
    """Return the JSON Schema of a notice of dead letters."""
    instant, counts = {"type": "string", "format": "date-time"}, {"type": "integer", "minimum": 1}
    letter = {
        "id": {"type": "string", "format": "uuid"},
        "incoming_email_id": {"type": ["string", "null"], "format": "uuid"},
        "reason": {"type": "string"},
        "queue_name": {"type": "string"},
        "created_at": instant,
    }
    properties: dict[str, Any] = {
        "type": {"const": notices.TYPE},
        "notice_id": {"type": "string", "format": "uuid"},
        "recorded_at": instant,
        "count": counts,
        "by_reason": {"type": "object", "additionalProperties": counts},
        "by_queue": {"type": "object", "additionalProperties": counts},
        "first_at": instant,
        "last_at": instant,
        "dead_letters": {
            "type": "array",
            "maxItems": notices.MAX_NAMED,
            "items": {"type": "object", "properties": letter, "required": [*letter]},
        },
    }
    return {"type": "object", "properties": properties, "required": [*properties]}


def _email_message() -> dict[str, Any]:
    return {
        "summary": "A request to send one email.",
        "correlationId": {"location": "$message.header#/correlation_id"},
        "headers": {
            "type": "object",
            "properties": {"traceparent": {"type": "string", "description": "W3C Trace Context."}},
        },
        "payload": {"$ref": "#/components/schemas/SendEmail"},
    }


def _event_message(type: EventType) -> dict[str, Any]:
    return {
        "name": type.value,
        "summary": _SUMMARIES[type],
        "correlationId": {"location": "$message.header#/correlation_id"},
        "payload": {"$ref": f"#/components/schemas/{type.value}"},
        "bindings": {"amqp": {"messageType": type.value}},
    }


def _notice_message() -> dict[str, Any]:
    return {
        "name": notices.TYPE,
        "summary": "Mail was given up; once a minute, for all that came since.",
        "payload": {"$ref": f"#/components/schemas/{notices.TYPE}"},
        "bindings": {"amqp": {"messageType": notices.TYPE}},
    }


if __name__ == "__main__":
    print(orjson.dumps(document(), option=orjson.OPT_INDENT_2).decode())
