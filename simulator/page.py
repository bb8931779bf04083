"""The page at ``/``: what left lately, and what is set to go wrong."""

from __future__ import annotations

from dataclasses import asdict
from html import escape
from itertools import islice
from typing import Any

from .journal import Delivery
from .world import World

#: So many deliveries are shown.
SHOWN = 100

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2433; background: #f6f7f9 }
body { margin: 0 auto; max-width: 72rem; padding: 2rem }
h1 { font-size: 1.4rem; margin: 0 0 .2rem } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem }
p { color: #5a6478; margin: 0 }
table { border-collapse: collapse; width: 100%; background: #fff; border: 1px solid #e2e6ee; border-radius: 6px }
th, td { text-align: left; padding: .45rem .7rem; border-bottom: 1px solid #eef0f4; vertical-align: top }
th { font-weight: 600; color: #5a6478; font-size: .85rem } code { font-size: .85rem; color: #5a6478 }
"""


def render(world: World) -> str:
    deliveries = world.journal.deliveries
    latest = islice(reversed(deliveries), SHOWN)
    faults = [(fault.kind, fault.as_json()) for fault in world.faults]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="3"><title>Graph simulator</title>
<style>{_STYLE}</style></head><body>
<h1>Graph simulator</h1>
<p>{len(deliveries)} mails from {len(world.mailboxes)} mailboxes. None of them has left this machine.</p>
<h2>Sent, newest first</h2>{_table(("Time", "From", "To", "Subject", "Attachments"), [_row(each) for each in latest])}
<h2>Faults to come</h2>{_table(("Fault", "Details"), [_fault_row(*each) for each in faults])}
<h2>Mailboxes that refuse</h2>{_table(("Mailbox", "Why"), _refusing(world))}
<h2>Limits and behaviour</h2>{_table(("Name", "Value"), _settings(world))}
</body></html>"""


def _row(delivery: Delivery) -> tuple[str, ...]:
    message = delivery.message
    attachments = ", ".join(f"{each.name} ({each.content.size_bytes:,} bytes)" for each in message.attachments)
    recipients = message.recipients()
    shown = ", ".join(recipients[:3]) + (f" and {len(recipients) - 3} more" if len(recipients) > 3 else "")
    return f"{delivery.at:%H:%M:%S}", delivery.mailbox, shown, message.fields.get("subject") or "", attachments


def _fault_row(kind: str, details: dict[str, Any]) -> tuple[str, ...]:
    told = {name: value for name, value in details.items() if name not in ("kind", "id") and value is not None}
    return kind, ", ".join(f"{name} {value}" for name, value in told.items())


def _refusing(world: World) -> list[tuple[str, ...]]:
    return [(each.address, each.refusal.message) for each in world.mailboxes.values() if each.refusal is not None]


def _settings(world: World) -> list[tuple[str, ...]]:
    return [
        (name.replace("_", " "), str(value))
        for name, value in (asdict(world.throttle.limits) | asdict(world.behaviour)).items()
    ]


def _table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    if not rows:
        return "<p>None.</p>"
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"
