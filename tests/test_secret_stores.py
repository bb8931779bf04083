"""Secret stores over HTTP: every way to log in, every way to fail, and no word of a secret in an error."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from secret_store_fakes import VAULT_STATES, FakeAzure, FakeVault, Reply

import secret_stores
from secret_stores import SecretRefused, SecretStore, StoreFailed, open_store

SECRET = "hunter2-hunter2"


@pytest.fixture
def vault() -> Iterator[FakeVault]:
    fake = FakeVault()
    with fake.running():
        fake.secrets["REDIS_URL"] = SECRET
        yield fake


@pytest.fixture
def azure() -> Iterator[FakeAzure]:
    fake = FakeAzure()
    with fake.running():
        fake.secrets["REDIS-URL"] = SECRET
        yield fake


def approle(vault: FakeVault, **credentials: str) -> SecretStore:
    return open_store(vault.address, {"VAULT_ROLE_ID": "fleet", "VAULT_SECRET_ID": "s-1"} | credentials)


def identity(azure: FakeAzure, **credentials: str) -> SecretStore:
    ours = {"AZURE_AUTHORITY_HOST": azure.origin, "AZURE_POD_IDENTITY_AUTHORITY_HOST": azure.origin}
    return open_store(azure.address, ours | credentials)


def test_vault_is_read_with_a_token(vault: FakeVault) -> None:
    vault.tokens.add("root")
    store = open_store(vault.address, {"VAULT_TOKEN": "root"})
    assert (store.read("REDIS_URL"), store.read("CONSOLE_TOKENS")) == (SECRET, None)
    assert vault.logins == 0


def test_vault_is_read_by_approle_with_one_login(vault: FakeVault) -> None:
    store = approle(vault)
    assert (store.read("REDIS_URL"), store.read("REDIS_URL")) == (SECRET, SECRET)
    assert vault.logins == 1


def test_vault_is_read_as_a_service_account_of_kubernetes_in_a_namespace(vault: FakeVault, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("pod\n")
    vault.namespace = "team"
    pod = {"VAULT_KUBERNETES_ROLE": "fleet", "VAULT_KUBERNETES_TOKEN_PATH": str(tmp_path / "token")}
    assert open_store(vault.address, {**pod, "VAULT_NAMESPACE": "team"}).read("REDIS_URL") == SECRET
    (tmp_path / "token").unlink()
    with pytest.raises(StoreFailed, match="cannot be read from its file"):
        open_store(vault.address, {**pod, "VAULT_NAMESPACE": "team"}).read("REDIS_URL")


def test_a_token_that_was_revoked_is_replaced(vault: FakeVault, azure: FakeAzure) -> None:
    for fake, store in ((vault, approle(vault)), (azure, identity(azure))):
        store.read("REDIS_URL")
        fake.tokens.clear()
        assert store.read("REDIS_URL") == SECRET
        assert fake.logins == 2


@pytest.mark.parametrize(
    "credentials",
    [
        {},
        {"AZURE_CLIENT_ID": "mine"},
        {"AZURE_TENANT_ID": "contoso", "AZURE_CLIENT_ID": "app", "AZURE_CLIENT_SECRET": "s-1"},
        {"AZURE_TENANT_ID": "contoso", "AZURE_CLIENT_ID": "app", "AZURE_FEDERATED_TOKEN_FILE": "token"},
    ],
    ids=["managed identity", "user-assigned identity", "client secret", "workload identity"],
)
def test_azure_is_read_by_every_identity(azure: FakeAzure, tmp_path: Path, credentials: dict[str, str]) -> None:
    if "AZURE_FEDERATED_TOKEN_FILE" in credentials:
        (tmp_path / "token").write_text("pod")
        credentials = {**credentials, "AZURE_FEDERATED_TOKEN_FILE": str(tmp_path / "token")}
    store = identity(azure, **credentials)
    assert (store.read("REDIS_URL"), store.read("CONSOLE_TOKENS"), azure.logins) == (SECRET, None, 1)


def test_a_wrong_login_is_told_without_what_was_given(vault: FakeVault, azure: FakeAzure) -> None:
    wrong = {"AZURE_TENANT_ID": "contoso", "AZURE_CLIENT_ID": "app", "AZURE_CLIENT_SECRET": SECRET}
    for store in (approle(vault, VAULT_SECRET_ID=SECRET), identity(azure, **wrong)):
        with pytest.raises(StoreFailed, match="status 40") as failed:
            store.read("REDIS_URL")
        assert SECRET not in str(failed.value)
        assert failed.value.__cause__ is None


@pytest.mark.parametrize(
    "reply",
    [
        Reply(500, {}),
        Reply(200, b"<html>" + SECRET.encode()),
        Reply(200, []),
        Reply(200, {"data": {}}),
        Reply(200, {"auth": {}}),
        Reply(302, b"", {"Location": "http://127.0.0.1:1/"}),
        Reply(200, b"[" + b" " * 1_100_000 + b"]"),
    ],
    ids=["fails", "no JSON", "a list", "no value", "no token", "a redirect", "endless"],
)
def test_whatever_is_no_secret_is_an_error_and_shows_nothing(vault: FakeVault, azure: FakeAzure, reply: Any) -> None:
    for fake, store in ((vault, approle(vault)), (azure, identity(azure))):
        for logged_in in (False, True):
            if logged_in:
                fake.instead = None
                store.read("REDIS_URL")
            fake.instead = reply
            with pytest.raises(StoreFailed) as failed:
                store.read("REDIS_URL")
            assert SECRET not in str(failed.value)


def test_a_token_that_was_replaced_while_it_was_used_is_looked_up_again(vault: FakeVault) -> None:
    class Renewed(dict[str, str]):
        """A file whose token is another once it has been read for a request."""

        def get(self, name: str, default: Any = None) -> Any:
            if name == "VAULT_TOKEN" and "waiting" in self:
                self["VAULT_TOKEN"] = self.pop("waiting")
                return "ended"
            return super().get(name, default)

    credentials = Renewed(VAULT_TOKEN="first")
    store = open_store(vault.address, credentials)
    vault.tokens.add("second")
    credentials["waiting"] = "second"
    assert store.read("REDIS_URL") == SECRET
    # When it is gone altogether
    credentials["VAULT_TOKEN"] = ""
    with pytest.raises(StoreFailed, match="cannot be read from its file"):
        store.read("REDIS_URL")


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeVault]:
    """What the environment names as proxy, and a file that knows another login for this machine."""
    fake = FakeVault()
    with fake.running():
        for variable in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(variable, f"http://127.0.0.1:{fake.port}")
            monkeypatch.setenv(variable.lower(), f"http://127.0.0.1:{fake.port}")
        for variable in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(variable, raising=False)
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login ann password another\n")
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        yield fake


def test_this_machine_is_asked_without_a_proxy_and_with_the_login_that_was_given(
    vault: FakeVault, azure: FakeAzure, proxy: FakeVault
) -> None:
    assert approle(vault).read("REDIS_URL") == SECRET
    assert identity(azure).read("REDIS_URL") == SECRET
    assert proxy.asked == []


def test_the_machines_metadata_is_asked_without_a_proxy_and_a_store_elsewhere_through_it(
    monkeypatch: pytest.MonkeyPatch, proxy: FakeVault
) -> None:
    # Given no network, in which requests would wait for the address of the metadata
    monkeypatch.setattr(secret_stores, "_PATIENCE", timedelta(milliseconds=50))
    for store in (
        open_store("azure-key-vault://v.vault.azure.net", {}),
        open_store("vault://vault.example/kv/x", {"VAULT_TOKEN": "t"}),
    ):
        before = len(proxy.connects)
        with pytest.raises(StoreFailed):
            store.read("REDIS_URL")
    assert proxy.asked == []
    assert (before, len(proxy.connects)) == (0, 1)


def test_what_a_policy_forbids_is_named(vault: FakeVault) -> None:
    with pytest.raises(StoreFailed, match="does not let us read REDIS_URL"):
        open_store(vault.address, {"VAULT_TOKEN": "another"}).read("REDIS_URL")


def test_a_policy_that_leaves_one_secret_out_is_told_of_that_one_and_costs_no_other(vault: FakeVault) -> None:
    vault.secrets["CONSOLE_TOKENS"] = SECRET
    vault.forbidden.add("CONSOLE_TOKENS")
    store = approle(vault)
    with pytest.raises(SecretRefused, match="Vault does not let us read CONSOLE_TOKENS"):
        store.read("CONSOLE_TOKENS")
    assert store.read("REDIS_URL") == SECRET


def test_a_secret_whose_newest_version_was_deleted_is_named_and_not_taken_for_one_that_never_was(
    vault: FakeVault,
) -> None:
    vault.deleted.add("REDIS_URL")
    with pytest.raises(StoreFailed, match="newest version of REDIS_URL in Vault was deleted: undelete it, or write"):
        approle(vault).read("REDIS_URL")


@pytest.mark.parametrize("logged_in", [False, True])
@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("sealed", "is sealed or in maintenance"),
        ("in maintenance", "is sealed or in maintenance"),
        ("standby", "is a standby, or asked too often"),
        ("performance standby", "is a standby, or asked too often"),
    ],
)
def test_a_vault_that_can_do_nothing_for_us_says_why(vault: FakeVault, state: str, said: str, logged_in: bool) -> None:
    store = approle(vault)
    if logged_in:
        store.read("REDIS_URL")
    vault.instead = VAULT_STATES[state]
    with pytest.raises(StoreFailed, match=f"Vault.* answers with status {VAULT_STATES[state].status}: it {said}"):
        store.read("REDIS_URL")


def test_a_store_that_is_away_is_an_error() -> None:
    with pytest.raises(StoreFailed, match="Vault does not answer"):
        open_store("vault+http://127.0.0.1:1/kv/x", {"VAULT_TOKEN": "t"}).read("REDIS_URL")


@pytest.mark.parametrize(
    ("address", "credentials"),
    [
        ("vault+http://vault.example/kv/x", {"VAULT_TOKEN": "t"}),
        ("vault://vault.example", {"VAULT_TOKEN": "t"}),
        (f"vault://user:{SECRET}@vault.example/kv", {"VAULT_TOKEN": "t"}),
        ("vault://vault.example/kv", {}),
        ("vault://vault.example/kv", {"VAULT_ROLE_ID": "r"}),
        ("vault://vault.example/kv", {"VAULT_TOKEN": "t", "VAULT_KUBERNETES_ROLE": "r"}),
        ("azure-key-vault://v.vault.azure.net/path", {}),
        ("azure-key-vault://v.vault.azure.net", {"AZURE_CLIENT_SECRET": SECRET}),
        ("azure-key-vault://v.vault.azure.net", {"AZURE_AUTHORITY_HOST": "http://login.example"}),
        ("aws://x", {}),
        ("nonsense", {}),
    ],
)
def test_what_cannot_be_a_store_is_refused_before_anything_is_asked(address: str, credentials: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"must|needs|need|accepted") as refused:
        open_store(address, credentials)
    assert SECRET not in str(refused.value)
