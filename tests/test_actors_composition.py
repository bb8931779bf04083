"""From a stored ``SendEmail`` to Graph's message: what a file is called on the mail, and how large it is."""

from __future__ import annotations

import pytest
import support
from support import Fleet, store, table

from actors.composition import file_name

shared_database, tables, fleet = support.shared_database, support.tables, support.fleet

NAMES = {
    # as it is
    "report.pdf": "report.pdf",
    "Übersicht – 報告 📎.pdf": "Übersicht – 報告 📎.pdf",
    "می\u200cخواهم 👩\u200d💻.txt": "می\u200cخواهم 👩\u200d💻.txt",
    "a (1), b & c; d's #2 [x] 50% = $5 + @home~.tar.gz": "a (1), b & c; d's #2 [x] 50% = $5 + @home~.tar.gz",
    ".profile": ".profile",
    "a  b": "a  b",
    "Console.log": "Console.log",
    "COM10": "COM10",
    "nullable.txt": "nullable.txt",
    # no path
    "../../etc/passwd": "passwd",
    "C:\\Windows\\evil.exe": "evil.exe",
    "folder/": "attachment",
    # read as it is
    "invoice\u202efdp.exe": "invoicefdp.exe",
    "a\u200b\ufeffb\u0007.pdf": "ab.pdf",
    # saved as it reads
    "x.exe.": "x.exe",
    "x.exe. . .": "x.exe",
    "x.exe \u200b ": "x.exe",
    " x.exe": "x.exe",
    # saved at all, and where it can be seen
    "a.pdf:stream": "a.pdf_stream",
    "a.pdf::$DATA": "a.pdf__$DATA",
    'why? "so" <now> a|b *.txt': "why_ _so_ _now_ a_b _.txt",
    "CON": "_CON",
    "nul.txt": "_nul.txt",
    "Aux .tar.gz": "_Aux .tar.gz",
    "com1": "_com1",
    "LPT9.pdf": "_LPT9.pdf",
    "COM².txt": "_COM².txt",
    "CONIN$": "_CONIN$",
    "prn. ": "_prn",
    # called something
    "..": "attachment",
    " ": "attachment",
    "\u200b": "attachment",
}


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_file_is_called_by_a_name_that_is_what_it_reads_as_and_can_be_saved(name: str) -> None:
    assert file_name(name) == NAMES[name]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_name_that_was_made_fit_stays_as_it_is(name: str) -> None:
    assert file_name(file_name(name)) == file_name(name)


def test_what_a_mailbox_refuses_as_too_large_is_told_in_the_size_that_exchange_counts(fleet: Fleet) -> None:
    # Given
    fleet.graph.set_behaviour(max_message_bytes=1_000_000)
    files = [
        {"name": name, "size": 800_000, "urlOrId": fleet.graph.file_url(800_000, seed=name)} for name in ("a", "b")
    ]
    store(attachments=files)
    # When
    assert fleet.send() == ["dead-lettered"]
    # Then
    (letter,) = table("dlq")
    assert "in base64 the attachments have 2,133,336 bytes" in letter["last_error"]
