"""Who may send from what, and whom mail reaches: what the operator's patterns mean."""

from __future__ import annotations

import pytest

from mail_rules import RecipientFirewall, SenderRule, refusal_of_sender

MAIL = {"to": ["ann@example.org", "qa@test.example"], "cc": ["bob@example.org"], "bcc": ["carl@example.org"]}


def refusal(mailbox: str, user: str | None, *entries: str) -> str | None:
    return refusal_of_sender(mailbox, user, [SenderRule.parse(entry) for entry in entries])


@pytest.mark.parametrize(
    ("mailbox", "user", "entries"),
    [
        ("ann@example.com", None, ["*"]),
        ("ann@example.com", "crm", ["*@example.com"]),
        ("ann@example.com", None, ["*@Example.com"]),
        ("ann@example.com", "crm", ["crm=ann@*"]),
        ("ann@example.com", "crm", ["billing=ann@*", "crm=ann@*"]),
        ("a=b@example.com", None, ["*=a=b@example.com"]),
    ],
)
def test_whoever_a_rule_names_may_send(mailbox: str, user: str | None, entries: list[str]) -> None:
    assert refusal(mailbox, user, *entries) is None


@pytest.mark.parametrize(
    ("user", "entries", "reason"),
    [
        ("crm", ["*@example.net"], "this mailbox may not be sent from"),
        ("crm", ["billing=*"], "may not send from this mailbox"),
        ("CRM", ["crm=*"], "may not send from this mailbox"),
        (None, ["crm=*"], "user_id names none"),
        ("*", ["crm=*"], "may not send from this mailbox"),
    ],
)
def test_nobody_else_may_and_is_told_why(user: str | None, entries: list[str], reason: str) -> None:
    assert reason in (refusal("ann@example.com", user, *entries) or "")


def test_without_a_firewall_mail_reaches_whomever_it_names() -> None:
    firewall = RecipientFirewall.parse(())
    assert not firewall.stands
    assert firewall.reached(MAIL) == MAIL


def test_an_allow_list_leaves_all_others_out() -> None:
    firewall = RecipientFirewall.parse(
        (
            "*@TEST.example",
            "carl@example.org",
        )
    )
    assert firewall.reached(MAIL) == {"to": ["qa@test.example"], "cc": [], "bcc": ["carl@example.org"]}
    assert firewall.headers({"headers": {"x-a": "1"}}) == {"x-a": "1"}
    assert "@" not in str(firewall)


def test_a_redirect_sends_all_to_one_address_and_names_the_recipients_in_headers() -> None:
    firewall = RecipientFirewall.parse(("redirect:qa@test.example",))
    assert firewall.reached(MAIL) == {"to": ["qa@test.example"]}
    assert firewall.headers(MAIL) == {
        "x-original-to": "ann@example.org, qa@test.example",
        "x-original-cc": "bob@example.org",
        "x-original-bcc": "carl@example.org",
    }
    assert "@" not in str(firewall)


def test_replies_reach_nobody_whom_the_mail_may_not_reach() -> None:
    mail = {**MAIL, "reply_to": ["sales@customer.example", "qa@test.example"]}
    assert RecipientFirewall.parse(("*@test.example",)).replied_to(mail) == ["qa@test.example"]
    redirect = RecipientFirewall.parse(("redirect:team@test.example",))
    assert redirect.replied_to(mail) == ["team@test.example"]
    assert redirect.headers(mail)["x-original-reply-to"] == "sales@customer.example, qa@test.example"
    assert redirect.replied_to(MAIL) == []


def test_of_more_headers_than_graph_takes_the_publishers_last_give_way() -> None:
    firewall = RecipientFirewall.parse(("redirect:qa@test.example",))
    given = {f"x-{n}": str(n) for n in range(4)} | {"X-Original-To": "forged"}
    headers = firewall.headers({**MAIL, "headers": given})
    assert list(headers) == ["x-0", "x-1", "x-original-to", "x-original-cc", "x-original-bcc"]


def test_of_more_recipients_than_a_header_holds_the_rest_are_counted() -> None:
    many = [f"recipient-{n}@example.org" for n in range(500)]
    (header,) = RecipientFirewall.parse(("redirect:qa@test.example",)).headers({"to": many}).values()
    assert len(header) <= 995
    shown = header.count("@")
    assert header.endswith(f" and {500 - shown} more")
