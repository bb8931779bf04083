"""What a request body may contain, compiled once from the types of Graph's metadata.

The real service accepts a few things that its metadata does not list, but nobody can rely on them: every member that is
unknown, every value of a wrong type and every unknown enumeration member is refused here.
The types are those of https://graph.microsoft.com/v1.0/$metadata.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from . import errors

Check = Callable[[Any], None]

_RECIPIENTS = "Collection(recipient)"

TYPES: Mapping[str, Mapping[str, str]] = {
    "message": {
        "id": "String",
        "categories": "Collection(String)",
        "changeKey": "String",
        "createdDateTime": "DateTimeOffset",
        "lastModifiedDateTime": "DateTimeOffset",
        "bccRecipients": _RECIPIENTS,
        "body": "itemBody",
        "bodyPreview": "String",
        "ccRecipients": _RECIPIENTS,
        "conversationId": "String",
        "conversationIndex": "Binary",
        "flag": "followupFlag",
        "from": "recipient",
        "hasAttachments": "Boolean",
        "importance": "importance",
        "inferenceClassification": "inferenceClassificationType",
        "internetMessageHeaders": "Collection(internetMessageHeader)",
        "internetMessageId": "String",
        "isDeliveryReceiptRequested": "Boolean",
        "isDraft": "Boolean",
        "isRead": "Boolean",
        "isReadReceiptRequested": "Boolean",
        "parentFolderId": "String",
        "receivedDateTime": "DateTimeOffset",
        "replyTo": _RECIPIENTS,
        "sender": "recipient",
        "sentDateTime": "DateTimeOffset",
        "subject": "String",
        "toRecipients": _RECIPIENTS,
        "uniqueBody": "itemBody",
        "webLink": "String",
        "attachments": "Collection(fileAttachment)",
        "extensions": "Collection(extension)",
        "multiValueExtendedProperties": "Collection(multiValueLegacyExtendedProperty)",
        "singleValueExtendedProperties": "Collection(singleValueLegacyExtendedProperty)",
    },
    "fileAttachment": {
        "id": "String",
        "contentType": "String",
        "isInline": "Boolean",
        "lastModifiedDateTime": "DateTimeOffset",
        "name": "String",
        "size": "Int32",
        "contentBytes": "Binary",
        "contentId": "String",
        "contentLocation": "String",
    },
    "attachmentItem": {
        "attachmentType": "attachmentType",
        "contentId": "String",
        "contentType": "String",
        "isInline": "Boolean",
        "name": "String",
        "size": "Int64",
    },
    "itemBody": {"content": "String", "contentType": "bodyType"},
    "recipient": {"emailAddress": "emailAddress"},
    "emailAddress": {"address": "String", "name": "String"},
    "internetMessageHeader": {"name": "String", "value": "String"},
    "singleValueLegacyExtendedProperty": {"id": "String", "value": "String"},
    "multiValueLegacyExtendedProperty": {"id": "String", "value": "Collection(String)"},
    "extension": {"id": "String", "extensionName": "String"},
    "followupFlag": {
        "completedDateTime": "dateTimeTimeZone",
        "dueDateTime": "dateTimeTimeZone",
        "flagStatus": "followupFlagStatus",
        "startDateTime": "dateTimeTimeZone",
    },
    "dateTimeTimeZone": {"dateTime": "String", "timeZone": "String"},
}

ENUMERATIONS: Mapping[str, tuple[str, ...]] = {
    "bodyType": ("text", "html"),
    "importance": ("low", "normal", "high"),
    "inferenceClassificationType": ("focused", "other"),
    "attachmentType": ("file", "item", "reference"),
    "followupFlagStatus": ("notFlagged", "complete", "flagged"),
}

_INT32 = range(-(2**31), 2**31)
_INT64 = range(-(2**63), 2**63)


def _mistyped(value: Any, expected: str) -> errors.GraphError:
    return errors.unreadable_body(
        f"Cannot convert a value of JSON type '{type(value).__name__}' to the expected type '{expected}'."
    )


def _string(value: Any) -> None:
    if value is not None and type(value) is not str:
        raise _mistyped(value, "Edm.String")


def _boolean(value: Any) -> None:
    if value is not None and type(value) is not bool:
        raise _mistyped(value, "Edm.Boolean")


def _integer(within: range, name: str) -> Check:
    def check(value: Any) -> None:
        if value is not None and (type(value) is not int or value not in within):
            raise _mistyped(value, name)

    return check


def _instant(value: Any) -> None:
    if value is None:
        return
    try:
        if datetime.fromisoformat(value).tzinfo is not None:
            return
    except (TypeError, ValueError):
        pass
    raise _mistyped(value, "Edm.DateTimeOffset")


def _enumeration(members: tuple[str, ...]) -> Check:
    known = {member.lower() for member in members}

    def check(value: Any) -> None:
        if value is None:
            return
        if type(value) is not str:
            raise _mistyped(value, "Edm.Enum")
        if value.lower() not in known:
            raise errors.unreadable_body(f"Requested value '{value}' was not found.")

    return check


def _collection(element: Check) -> Check:
    def check(value: Any) -> None:
        if type(value) is not list:
            raise _mistyped(value, "Collection")
        for item in value:
            if item is None:
                raise _mistyped(item, "Collection element")
            element(item)

    return check


def _structure(type_name: str, members: dict[str, Check]) -> Check:
    own_types = (f"#microsoft.graph.{type_name}", f"microsoft.graph.{type_name}")

    def check(value: Any) -> None:
        if value is None:
            return
        if type(value) is not dict:
            raise _mistyped(value, f"microsoft.graph.{type_name}")
        for name, member in value.items():
            known = members.get(name)
            if known is not None:
                known(member)
            elif name != "@odata.type":
                raise errors.unknown_member(name, type_name)
            elif member not in own_types:
                raise errors.unreadable_body(f"The type '{member}' is not assignable to '{own_types[1]}'.")

    return check


def _compile() -> dict[str, Check]:
    checks: dict[str, Check] = {
        "String": _string,
        "Binary": _string,
        "Boolean": _boolean,
        "Int32": _integer(_INT32, "Edm.Int32"),
        "Int64": _integer(_INT64, "Edm.Int64"),
        "DateTimeOffset": _instant,
    }
    checks.update((name, _enumeration(members)) for name, members in ENUMERATIONS.items())
    members_of: dict[str, dict[str, Check]] = {name: {} for name in TYPES}
    checks.update((name, _structure(name, members)) for name, members in members_of.items())
    for name, members in TYPES.items():
        for member, kind in members.items():
            element = kind.removeprefix("Collection(").removesuffix(")")
            members_of[name][member] = checks[kind] if element == kind else _collection(checks[element])
    return checks


_CHECKS = _compile()


def check(type_name: str, value: Any) -> None:
    """Raise a GraphError unless ``value`` is an object of that type."""
    if value is None:
        raise _mistyped(value, f"microsoft.graph.{type_name}")
    _CHECKS[type_name](value)


def action_parameters(body: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """Return an action's parameters under ``names``; Graph matches these, unlike members, whatever their case.

    Raises:
        GraphError: The body is not an object, or has a parameter that the action does not.
    """
    if type(body) is not dict:
        raise errors.undeserializable_body()
    by_lower = {name.lower(): name for name in names}
    parameters = {}
    for given, value in body.items():
        name = by_lower.get(given.lower())
        if name is None:
            raise errors.bad_request(
                f"The parameter '{given}' in the request payload is not a valid parameter for the operation."
            )
        parameters[name] = value
    return parameters
