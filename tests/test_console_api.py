"""The management API over HTTP: who may what, what is answered, and that what is done is written down."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import support
from api_support import OPERATOR, VIEWER, Caller, console
from operator_support import MIME, archive, audited, foreign, give_up, letter_of, tamper
from support import email_row, rows

import operations
import runtime
from actors.budgets import keep_counts
from sandbox.world import ROOT

shared_database, tables = support.shared_database, support.tables
pytestmark = pytest.mark.usefixtures("tables")

BY_ANN = "api:ann"
EVERYTHING = [
    ("GET", "/openapi.json"),
    ("GET", "/emails"),
    ("GET", "/emails/order-1"),
    ("GET", "/dead-letters"),
    ("GET", "/dead-letters/groups"),
    ("GET", "/dead-letters/order-1"),
    ("GET", "/limits/*"),
    ("GET", "/limits/ann@example.com"),
    ("GET", "/pauses"),
    ("GET", "/backups"),
    ("GET", "/backups/order-1"),
]
#: With bodies that would do.
ACTIONS: list[tuple[str, str, Any]] = [
    ("POST", "/emails/order-1/cancel", None),
    ("GET", "/dead-letters/order-1/message", None),
    ("POST", "/dead-letters/replay", {"all": True}),
    ("POST", "/dead-letters/discard", {"all": True}),
    ("POST", "/dead-letters/order-1/replay", None),
    ("POST", "/dead-letters/order-1/discard", None),
    ("PUT", "/limits/*/sends", {"limit": 1}),
    ("DELETE", "/limits/*/sends", None),
    ("PUT", "/pauses/*", {}),
    ("DELETE", "/pauses/*", None),
    ("GET", "/backups/order-1/mime", None),
    ("POST", "/attachments", None),
]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with console() as url:
        yield url


@pytest.fixture
def viewer(url: str) -> Caller:
    return Caller(url, VIEWER)


@pytest.fixture
def operator(url: str) -> Caller:
    return Caller(url, OPERATOR)


@pytest.fixture
def no_limits_left_over() -> Iterator[None]:
    runtime.redis.flushdb()
    keep_counts()
    yield
    runtime.redis.flushdb()


# Who may what


def test_every_path_of_the_schema_is_tested_for_who_may_ask(operator: Caller) -> None:
    patterns = {"order-1": "{id}", "ann@example.com": "{mailbox}", "/limits/*": "/limits/{mailbox}"}
    patterns |= {"/pauses/*": "/pauses/{subject}", "/sends": "/{budget}"}

    def pattern(path: str) -> str:
        for example, name in patterns.items():
            path = path.replace(example, name)
        return f"/api/v1{path}"

    told = operator.get("/openapi.json")["paths"]
    declared = {(method.upper(), path) for path, methods in told.items() for method in methods if "/api/" in path}
    asked = [*EVERYTHING, *((method, path) for method, path, _ in ACTIONS)]
    assert declared == {(method, pattern(path)) for method, path in asked} - {("GET", "/api/v1/openapi.json")}


@pytest.mark.parametrize("path", ["/docs", "/docs.js"])
def test_the_page_that_shows_the_schema_loads_nothing_from_elsewhere(url: str, path: str) -> None:
    page = Caller(url, None).ask("GET", path)
    assert page.status_code == 200
    assert "//" not in page.text.replace("// Shows", "")
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]


def test_without_a_token_nothing_is_answered(url: str) -> None:
    for method, path in EVERYTHING:
        Caller(url, None).problem(method, path, 401)
        Caller(url, OPERATOR + "x").problem(method, path, 401)
    for method, path, body in ACTIONS:
        Caller(url, None).problem(method, path, 401, json=body)


def test_a_token_is_asked_for_before_anything_is_said_of_the_request(url: str, viewer: Caller) -> None:
    for method, path, body in ACTIONS:
        wrong = {"data": b"{", "headers": {"Content-Type": "application/json"}} if body is not None else {}
        Caller(url, None).problem(method, f"{path}?unknown=1", 401, **wrong)
        viewer.problem(method, f"{path}?unknown=1", 403, **wrong)


@pytest.mark.parametrize("path", [path for method, path in EVERYTHING if path != "/openapi.json"])
def test_a_parameter_that_there_is_not_or_that_is_given_twice_is_refused(viewer: Caller, path: str) -> None:
    """A misspelt filter would have everything shown, or replayed."""
    (fault,) = viewer.problem("GET", f"{path}?malibox=ann@example.com", 422)["errors"]
    assert fault == {"where": "query.malibox", "problem": "there is no such parameter"}
    if path in ("/emails", "/dead-letters", "/backups"):
        (fault,) = viewer.problem("GET", f"{path}?mailbox=a@example.com&mailbox=b@example.com", 422)["errors"]
        assert fault == {"where": "query.mailbox", "problem": "is given more than once"}


def test_the_schema_tells_every_status_that_a_path_may_answer(operator: Caller) -> None:
    told = operator.get("/openapi.json")["paths"]

    def statuses(method: str, path: str) -> set[str]:
        return set(told[f"/api/v1{path}"][method]["responses"])

    always = {"401", "403", "422", "429", "503"}
    assert statuses("get", "/emails") == always | {"200"}
    assert statuses("get", "/emails/{id}") == always | {"200", "404"}
    assert statuses("post", "/emails/{id}/cancel") == always | {"200", "404", "409"}
    assert statuses("post", "/dead-letters/replay") == always | {"200", "400", "413"}
    assert statuses("put", "/limits/{mailbox}/{budget}") == always | {"200", "400", "413"}
    assert statuses("get", "/backups/{id}/mime") == always | {"200", "404"}
    assert statuses("post", "/attachments") == always | {"201", "400", "408", "413", "415"}


def test_a_viewer_looks_and_neither_acts_nor_takes_content_out(viewer: Caller) -> None:
    give_up()
    archive("order-2")
    before = support.everything()
    for method, path, body in ACTIONS:
        viewer.problem(method, path.replace("backups/order-1", "backups/order-2"), 403, json=body)
    assert support.everything() == before
    assert audited() == []


def test_without_tokens_this_machine_looks_and_does_not_act() -> None:
    give_up()
    with console(tokens="") as url:
        anyone = Caller(url, None)
        assert len(anyone.get("/emails")["emails"]) == 1
        for method, path, body in ACTIONS:
            anyone.problem(method, path, 403, json=body)
    assert audited() == []


def test_content_and_recipients_are_shown_to_nobody(operator: Caller) -> None:
    id = give_up(subject="Quarterly secrets", to=["bob@example.org"])
    shown = [operator.get(path) for path in ("/emails", f"/emails/{id}", "/dead-letters", f"/dead-letters/{id}")]
    for secret in ("Quarterly", "bob@", "Thank you"):
        assert secret not in str(shown)


# Emails


def test_an_email_is_found_by_each_filter_and_by_all_together(viewer: Caller) -> None:
    # Given
    id = give_up("order-1", metadata={"tenant": "acme"})
    doubted = support.store(publisher_message_id="doubted", **{"from": "bo@example.com"})
    support.claim(doubted).mark_in_doubt(look_again_in=support.WITHIN, evidence={})
    waiting = support.store(publisher_message_id="waiting")
    # Then
    for filters, expected in (
        ({}, [waiting, doubted, id]),
        ({"status": "failed"}, [id]),
        ({"status": "received"}, [waiting]),
        ({"status": "processing"}, [doubted]),
        ({"in_doubt": True}, [doubted]),
        ({"mailbox": "Ann@Example.com"}, [waiting, id]),
        ({"tenant": "acme"}, [id]),
        ({"publisher_message_id": "waiting"}, [waiting]),
        ({"error": "graph SAYS"}, [id]),
        ({"since": "2020-01-01T00:00:00Z", "until": "2999-01-01T00:00:00Z"}, [waiting, doubted, id]),
        ({"since": "2999-01-01T00:00:00Z"}, []),
        ({"until": "1969-01-01T00:00:00Z"}, []),
        ({"status": "failed", "mailbox": "ann@example.com", "tenant": "acme", "error": "no"}, [id]),
        ({"status": "failed", "mailbox": "bo@example.com"}, []),
    ):
        found = viewer.get("/emails", **filters)
        assert [email["incoming_email_id"] for email in found["emails"]] == expected, filters
        assert found["next"] is None
    assert [email["in_doubt"] for email in viewer.get("/emails")["emails"]] == [False, True, False]


def test_pages_neither_repeat_nor_skip_an_email_while_others_come(viewer: Caller) -> None:
    stored = [each.incoming_email_id for each in support.store_many(5)]
    seen, cursor = [], None
    while True:
        page = viewer.get("/emails", limit=2, **({"cursor": cursor} if cursor else {}))
        seen += [email["incoming_email_id"] for email in page["emails"]]
        support.store(publisher_message_id=f"later-{len(seen)}")
        if (cursor := page["next"]) is None:
            break
    assert seen == sorted(stored, reverse=True)


def test_an_email_is_shown_with_all_that_the_command_line_knows_and_its_timeline(viewer: Caller) -> None:
    id = give_up()
    known = viewer.get("/emails/order-1")
    assert known["incoming_email_id"] == id
    assert known.keys() - {"timeline"} == operations.status(id).keys()
    told = [happening["what"] for happening in known["timeline"]]
    assert told[0] == "received"
    assert "attempt 1 taken up by a worker" in told
    assert "dead letter (open): invalid_recipient" in told


def test_an_email_is_cancelled_once_and_by_name(operator: Caller) -> None:
    id = support.store()
    assert operator.do("POST", "/emails/order-1/cancel") == {"id": "order-1", "outcome": "cancelled"}
    assert operator.do("POST", f"/emails/{id}/cancel")["outcome"] == "cancelled before"
    assert email_row(id)["status"] == "cancelled"
    assert audited() == [(BY_ANN, "cancel", id)]
    runtime.close()


def test_an_email_that_has_ended_otherwise_is_not_cancelled_and_that_is_said(operator: Caller) -> None:
    give_up()
    assert "it has failed" in operator.problem("POST", "/emails/order-1/cancel", 409)["detail"]


# Dead letters


def test_dead_letters_are_listed_by_pages_and_told_by_their_cause(viewer: Caller) -> None:
    # Given
    ids = [letter_of(give_up(f"order-{n}")) for n in range(3)]
    full = letter_of(give_up("order-9", reason="mailbox_full", **{"from": "bo@example.com"}))
    # When
    first = viewer.get("/dead-letters", limit=3)
    second = viewer.get("/dead-letters", limit=3, cursor=first["next"])
    # Then
    assert [[letter["id"] for letter in page["dead_letters"]] for page in (first, second)] == [ids, [full]]
    assert second["next"] is None
    groups = viewer.get("/dead-letters/groups")
    assert [(group["reason"], group["dead_letters"], group["mailbox"]) for group in groups] == [
        ("invalid_recipient", 3, "ann@example.com"),
        ("mailbox_full", 1, "bo@example.com"),
    ]
    assert viewer.get("/dead-letters", reason="mailbox_full")["dead_letters"][0]["last_error"] == "Graph says no"
    assert [group["dead_letters"] for group in viewer.get("/dead-letters/groups", mailbox="bo@example.com")] == [1]


def test_many_are_replayed_a_bounded_number_with_each_request(operator: Caller) -> None:
    ids = [give_up(f"order-{n}") for n in range(5)]
    # A dry run changes nothing.
    meant = operator.do("POST", "/dead-letters/replay", reason="invalid_recipient", limit=2, dry_run=True)
    assert [letter["incoming_email_id"] for letter in meant["would_be_meant"]] == ids[:2]
    assert audited() == []
    # And then in earnest
    resolved, next = [], None
    while not resolved or next:
        done = operator.do("POST", "/dead-letters/replay", reason="invalid_recipient", limit=2, cursor=next)
        resolved.append(done["resolved"])
        next = done["next"]
    assert resolved == [2, 2, 1]
    assert {email_row(id)["status"] for id in ids} == {"received"}
    assert [(who, action) for who, action, _ in audited()] == [(BY_ANN, "dlq.replayed")] * 5


def test_what_cannot_be_replayed_holds_nothing_up(operator: Caller) -> None:
    foreign(b"not a message")
    id = give_up()
    first = operator.do("POST", "/dead-letters/replay", all=True, limit=1)
    assert first["outcomes"][0]["outcome"] == "no actor can read it: discard it"
    assert operator.do("POST", "/dead-letters/replay", all=True, limit=1, cursor=first["next"])["resolved"] == 1
    assert email_row(id)["status"] == "received"


def test_dead_letters_are_named_and_each_is_told_what_became_of_it(operator: Caller) -> None:
    id, letter = give_up(), letter_of(give_up("order-2"))
    ids = ["order-1", letter, "nobody's"]
    done = operator.do("POST", "/dead-letters/discard", ids=ids)
    assert done["resolved"] == 2
    assert done["outcomes"][0] == {"id": "nobody's", "outcome": "no dead letter has the id nobody's"}
    again = operator.do("POST", "/dead-letters/discard", ids=ids)
    assert (again["resolved"], again["outcomes"][0]["id"]) == (0, "order-1")
    assert email_row(id)["status"] == "failed"


def test_a_single_replay_may_be_repeated_and_cannot_be_undone_by_a_discard(operator: Caller) -> None:
    letter = letter_of(give_up())
    assert operator.do("POST", f"/dead-letters/{letter}/replay")["outcome"] == "replayed"
    assert operator.do("POST", f"/dead-letters/{letter}/replay")["outcome"] == "replayed before"
    assert "it was replayed by api:ann" in operator.problem("POST", f"/dead-letters/{letter}/discard", 409)["detail"]
    assert audited() == [(BY_ANN, "dlq.replayed", letter)]


def test_the_message_of_a_dead_letter_is_shown_to_an_operator_and_who_read_it_is_written_down(
    operator: Caller,
) -> None:
    letter = foreign(b"not a message")
    operator.get(f"/dead-letters/{letter}")
    assert audited() == []
    assert operator.get(f"/dead-letters/{letter}/message") == {"message": "not a message"}
    assert audited() == [(BY_ANN, "dlq.read", letter)]
    give_up()
    assert operator.get("/dead-letters/order-1/message") == {"message": None}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "say which"),
        ({"dry_run": True}, "say which"),
        ({"all": True, "limit": 501}, "less than or equal to 500"),
        ({"all": True, "per_second": 0}, "greater than or equal to 0.01"),
        ({"all": True, "per_second": 1, "limit": 100}, "at most 21"),
        ({"ids": ["x"] * 101}, "at most 100"),
        ({"all": True, "since": "yesterday"}, "datetime"),
        ({"all": True, "since": "2026-01-01T00:00:00"}, "timezone"),
        ({"all": True, "everything": 1}, "not permitted"),
        ({"reason": "\x00"}, "pattern"),
    ],
    ids=str,
)
def test_which_dead_letters_are_meant_has_to_be_said_within_bounds(
    operator: Caller, body: dict[str, Any], said: str
) -> None:
    give_up()
    assert said in str(operator.problem("POST", "/dead-letters/replay", 422, json=body)["errors"])
    assert audited() == []


# Limits and pauses


@pytest.mark.usefixtures("no_limits_left_over")
def test_limits_are_set_shown_and_unset(operator: Caller) -> None:
    own = "/limits/ann@example.com"
    assert operator.do("PUT", f"{own}/sends", limit=7)["before"] is None
    change = operator.do("PUT", f"{own}/recipients", limit=10)
    assert (change["after"], change["told"]) == (10, True)
    assert "never_fits" in change["warnings"][0]
    shown = operator.get(own)
    budget = next(each for each in shown["budgets"] if each["budget"] == "sends")
    assert (budget["limit"], budget["used"], budget["set_by"]) == (7, 0, BY_ANN)
    assert [each["budget"] for each in shown["limits"]] == ["recipients", "sends"]
    assert operator.do("DELETE", f"{own}/sends")["before"] == 7
    assert operator.do("PUT", "/limits/*/tenant_requests", limit=50)["after"] == 50
    assert operator.do("PUT", "/limits/*/backup_concurrency", limit=9)["after"] == 9
    assert operator.do("DELETE", "/limits/*/backup_concurrency")["before"] == 9
    assert {each["mailbox"] for each in operator.get("/limits/*")["limits"]} == {"*", "ann@example.com"}
    assert {(who, action) for who, action, _ in audited()} == {(BY_ANN, "limits.set"), (BY_ANN, "limits.unset")}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/limits/ann@example.com/speed", {"limit": 1}),
        ("/limits/ann@example.com/tenant_requests", {"limit": 1}),
        ("/limits/ann@example.com/send_plain_concurrency", {"limit": 1}),
        ("/limits/*/send_plain_concurrency", {"limit": 0}),
        ("/limits/ann@example.com/sends", {"limit": -1}),
        ("/limits/ann@example.com/sends", {"limit": 1.5}),
        ("/limits/ann@example.com/sends", {"limit": 10**14}),
        ("/limits/ann@example.com/sends", {}),
        ("/limits/nobody/sends", {"limit": 1}),
        ("/limits/%00@x/sends", {"limit": 1}),
        ("/pauses/nothing", {}),
        ("/pauses/*", {"seconds": 0}),
        ("/pauses/*", {"seconds": 10**9}),
        ("/pauses/*", {"why": "x" * 1001}),
        ("/pauses/*", {"why": "\ud800"}),
    ],
    ids=str,
)
def test_what_is_no_limit_and_no_pause_changes_nothing(operator: Caller, path: str, body: dict[str, Any]) -> None:
    operator.problem("PUT", path, 422, json=body)
    assert audited() == []


@pytest.mark.usefixtures("no_limits_left_over")
@pytest.mark.parametrize("subject", ["ann@example.com", "attachment", "*"])
def test_a_mailbox_a_route_and_everything_are_paused_and_resumed(operator: Caller, subject: str) -> None:
    paused = operator.do("PUT", f"/pauses/{subject}", why="an audit")
    assert paused == {"subject": subject, "until": None, "why": "an audit", "paused_by": BY_ANN}
    assert operator.do("PUT", f"/pauses/{subject}", seconds=60)["until"] is None  # what ends later stands
    assert operator.get("/pauses") == [paused]
    assert operator.do("DELETE", f"/pauses/{subject}") == {"subject": subject, "stood": True, "told": True}
    assert operator.do("DELETE", f"/pauses/{subject}")["stood"] is False
    assert operator.get("/pauses") == []
    assert {who for who, *_ in audited()} == {BY_ANN}


# Backups


def test_a_backup_is_exported_as_it_was_sent_and_that_is_written_down(operator: Caller) -> None:
    id = archive()
    (listed,) = operator.get("/backups", mailbox="ann@example.com")["backups"]
    assert operator.get("/backups", mailbox="bo@example.com")["backups"] == []
    assert operator.get("/backups/order-1") == listed
    exported = operator.ask("GET", f"/backups/{id}/mime")
    assert (exported.status_code, exported.content) == (200, MIME)
    assert exported.headers["Content-Type"] == "message/rfc822"
    assert exported.headers["Cache-Control"] == "no-store"
    assert listed["checksum"] == hashlib.sha256(MIME).hexdigest()
    assert audited() == [(BY_ANN, "backups.export", listed["id"])]


def test_backups_are_listed_by_pages(viewer: Caller) -> None:
    ids = [archive(f"order-{n}", mime=b"Subject: x\r\n\r\n") for n in range(3)]
    first = viewer.get("/backups", limit=2)
    second = viewer.get("/backups", limit=2, cursor=first["next"])
    found = [backup["incoming_email_id"] for backup in [*first["backups"], *second["backups"]]]
    assert found == ids[::-1]


def test_a_backup_that_is_not_genuine_never_looks_whole(operator: Caller) -> None:
    tamper(archive(mime=os.urandom(3_000_000)))  # many segments, for it does not compress
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        operator.ask("GET", "/backups/order-1/mime")
    tamper(archive("order-2", mime=b"Subject: short\r\n\r\n"))
    operator.problem("GET", "/backups/order-2/mime", 500)
    archive("order-3", mime=b"Subject: short\r\n\r\n")
    rows("UPDATE email_backups SET checksum = repeat('0', 64)")  # only the end shows that
    operator.problem("GET", "/backups/order-3/mime", 500)


# Bounds and problems


@pytest.mark.parametrize("path", ["/emails", "/dead-letters", "/backups"])
@pytest.mark.parametrize("cursor", ["", "x", "!", "späß", "eA==", "MSAx", "A" * 201, "bm90IGFuIGlk", "/%00"])
def test_a_cursor_that_no_list_has_given_is_refused(viewer: Caller, path: str, cursor: str) -> None:
    viewer.problem("GET", path, 422, params={"cursor": cursor})


@pytest.mark.parametrize(
    "query",
    [
        {"status": "lost"},
        {"limit": 0},
        {"limit": 501},
        {"since": "yesterday"},
        {"mailbox": "\x00"},
        {"error": "x" * 257},
        {"publisher_message_id": "\r\n"},
    ],
    ids=str,
)
def test_a_filter_that_is_none_is_refused(viewer: Caller, query: dict[str, Any]) -> None:
    assert viewer.problem("GET", "/emails", 422, params=query)["errors"][0]["where"] == f"query.{next(iter(query))}"


@pytest.mark.parametrize("id", ["nobody", "a' OR 1=1; --", "%25s", "sp%C3%A4%C3%9F", "%FF", "x" * 900])
def test_an_id_that_nobody_has_is_not_found(operator: Caller, id: str) -> None:
    for method, path in (
        ("GET", f"/emails/{id}"),
        ("POST", f"/emails/{id}/cancel"),
        ("GET", f"/dead-letters/{id}"),
        ("POST", f"/dead-letters/{id}/replay"),
        ("GET", f"/backups/{id}"),
        ("GET", f"/backups/{id}/mime"),
    ):
        operator.problem(method, path, 404)


def test_no_more_of_a_body_is_read_than_it_may_have(operator: Caller) -> None:
    large = b'{"ids": ["' + b"x" * 100_000 + b'"]}'
    operator.problem("POST", "/dead-letters/replay", 413, data=large)
    operator.problem("POST", "/dead-letters/replay", 413, data=iter([large]))
    operator.problem("POST", "/dead-letters/replay", 422, data=b"\xff{")


def test_what_is_not_there_and_what_is_not_done_there_are_problems_too(operator: Caller) -> None:
    operator.problem("GET", "/mails", 404)
    operator.problem("DELETE", "/emails", 405)


def test_a_server_that_is_away_is_a_problem_that_says_when_to_ask_again(operator: Caller, limit: Any) -> None:
    limit(url="redis://127.0.0.1:1/0")
    answer = operator.ask("GET", "/pauses")
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
    assert rows("SELECT 1")


limit = support.limit


# The documentation

_COMMAND = re.compile(r"^curl .+$", re.MULTILINE)


def run_curl(command: str, url: str) -> requests.Response:
    """Ask what a curl command would ask."""
    told = shlex.split(command.replace("$TOKEN", OPERATOR).replace("$API", f"{url}/api/v1"))[1:]
    given = {told[index]: told[index + 1] for index in range(0, len(told) - 1, 2)}
    assert given.keys() <= {"-H", "-X", "--json", "-o"}
    header, _, value = given["-H"].partition(": ")
    headers = {header: value} | ({"Content-Type": "application/json"} if "--json" in given else {})
    method = given.get("-X", "POST" if "--json" in given else "GET")
    return requests.request(method, told[-1], headers=headers, data=given.get("--json"), timeout=30)


@pytest.mark.usefixtures("no_limits_left_over")
def test_each_example_of_the_documentation_works_as_it_stands(url: str) -> None:
    billing = {"from": "billing@contoso.com"}
    give_up("invoice-4711", **billing)
    give_up("another", reason="mailbox_denied", **billing)
    archive("invoice-4713", **billing)
    support.store(publisher_message_id="invoice-4712", **billing)
    commands = _COMMAND.findall((ROOT / "docs" / "api.md").read_text())
    assert len(commands) > 15
    for command in commands:
        answer = run_curl(command, url)
        assert answer.status_code == 200, (command, answer.text)
    assert [action for _, action, _ in audited()] == [
        "cancel",
        "dlq.replayed",
        "dlq.discarded",
        "limits.set",
        "limits.unset",
        "limits.set",
        "pause",
        "resume",
        "backups.export",
    ]
    runtime.close()
