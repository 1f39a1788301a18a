"""`deepseek-api keys`, directly and through a service."""

import argparse
import json
import os
import re
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from deepseek_api_compat import control
from deepseek_api_compat.cli import key_options, keys
from deepseek_api_compat.errors import AuthenticationFailed, SetupError
from deepseek_api_compat.security.admin import open_admin
from deepseek_api_compat.security.keys import KeyTable, secret_key
from deepseek_api_compat.store.base import KeyRecord

Run = Callable[..., str]


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def run(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a `keys` command and return what it printed."""

    def run(*arguments: str) -> str:
        parser = argparse.ArgumentParser()
        keys.add_parser(parser.add_subparsers())
        args = parser.parse_args(["keys", *arguments, "--data-dir", str(data_dir)])
        assert args.run(args) == 0
        return capsys.readouterr().out

    return run


class Service(socketserver.ThreadingUnixStreamServer):
    """The supervisor's side of the control socket, over a KeyAdmin that only it may use."""

    daemon_threads = True

    def __init__(self, data_dir: Path) -> None:
        self.admin = open_admin(data_dir)
        self.seen: list[str] = []
        super().__init__(str(control.control_socket_path(data_dir)), _Handler)


class _Handler(socketserver.StreamRequestHandler):
    server: Service

    def handle(self) -> None:
        op, params = control.decode_request(self.rfile.readline())
        self.server.seen.append(op)
        try:
            self.wfile.write(control.encode_result(self.server.admin.handle(op, params)))
        except SetupError as error:
            self.wfile.write(control.encode_error(error))


@pytest.fixture(params=["directly", "through a service"])
def service(request: pytest.FixtureRequest, data_dir: Path) -> Iterator[Service | None]:
    if request.param == "directly":
        yield None
        return
    with Service(data_dir) as service:
        thread = threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield service
        service.shutdown()
        thread.join(5)
    service.admin.close()
    assert service.seen


def stored(data_dir: Path) -> tuple[Sequence[KeyRecord], bytes]:
    """The keys, and the master key."""
    admin = open_admin(data_dir)
    records = admin.store.list()
    admin.close()
    return records, admin.master


def test_quiet_prints_the_key_and_nothing_else(run: Run, data_dir: Path, service: Service | None) -> None:
    printed = run("create", "alice", "--quiet")
    assert re.fullmatch(r"DSK-\w{12}-\w{43}\n", printed)
    principal = KeyTable(*stored(data_dir)).authenticate(f"Bearer {printed.strip()}".encode())
    assert (principal.name, principal.role, principal.limits.rps) == ("alice", "user", None)


def test_json_prints_id_and_both_keys(run: Run, data_dir: Path, service: Service | None) -> None:
    created = json.loads(run("create", "bob", "--json", "--rps", "0", "--role", "metrics"))
    assert list(created) == ["id", "api_key", "secret_key"]
    (record,), master = stored(data_dir)
    assert (record.id, record.limits.rps, record.role) == (created["id"], 0, "metrics")
    assert created["secret_key"] == secret_key(master, record.id, 1)


def test_a_person_is_told_that_the_key_is_shown_once(run: Run) -> None:
    printed = run("create", "alice")
    assert "shown only now" in printed
    assert re.search(r"api_key +DSK-", printed)


def test_list_disable_enable_delete(run: Run, service: Service | None) -> None:
    id = json.loads(run("create", "alice", "--json"))["id"]
    run("create", "bob", "--quiet", "--rps", "2.5")
    assert run("disable", "alice") == f"Key 'alice' (id {id}) is disabled.\n"
    lines = [line.split() for line in run("list").splitlines()]
    shown = [(line[2], line[3], line[-1]) for line in lines[1:]]
    assert shown == [("disabled", "default", "alice"), ("enabled", "2.5", "bob")]
    assert lines[1][0] == id
    assert run("enable", id) == f"Key 'alice' (id {id}) is enabled.\n"
    assert run("delete", "bob").endswith("is deleted.\n")
    (listed,) = json.loads(run("list", "--json"))
    assert (listed["id"], listed["enabled"]) == (id, True)


OPTIONS = [
    "--role=admin",
    "--owner=ops",
    "--expires=2100-01-31",
    "--models=a,b",
    "--allow=10.0.0.0/8,::1",
    "--budget=12.50",
    "--rps=0.5",
    "--burst=1",
    "--rpm=2",
    "--tpm=3",
    "--tpd=0",
    "--concurrency=5",
]
FIELDS = {
    "role": "admin",
    "owner": "ops",
    "expires": 4_105_036_800,
    "models": ["a", "b"],
    "networks": ["10.0.0.0/8", "::1/128"],
    "budget": "12.5",
    "limits": {"rps": 0.5, "burst": 1, "rpm": 2, "tpm": 3, "tpd": 0, "concurrency": 5},
}
PLAIN = ["--role=user", "--owner=", "--expires=never", "--models=all", "--allow=all", "--budget=none"]


def of(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: fields[name] for name in FIELDS}


def test_all_that_a_key_has_can_be_given_and_taken_back(run: Run, service: Service | None) -> None:
    run("create", "alice", "--quiet", *OPTIONS)
    run("create", "bob", "--quiet")
    full, plain = json.loads(run("list", "--json"))
    assert of(full) == FIELDS
    assert json.loads(run("show", "alice", "--json")) == full
    no_limits = [f"--{limit}=default" for limit in FIELDS["limits"]]
    assert run("update", "alice", *PLAIN, *no_limits).endswith("is changed.\n")
    assert of(json.loads(run("show", "alice", "--json"))) == of(plain)
    run("update", "bob", *OPTIONS, "--name", "carol")
    assert of(json.loads(run("show", "carol", "--json"))) == FIELDS


def test_an_update_leaves_what_is_not_given(run: Run) -> None:
    run("create", "alice", "--quiet", *OPTIONS)
    run("update", "alice", "--tpm", "7")
    assert of(json.loads(run("show", "alice", "--json"))) == {
        **FIELDS,
        "limits": {**FIELDS["limits"], "tpm": 7},
    }
    with pytest.raises(SetupError, match="Nothing to change was given"):
        run("update", "alice")


def test_show_is_for_people(run: Run) -> None:
    run("create", "alice", "--quiet", *OPTIONS)
    lines = dict(line.split(None, 1) for line in run("show", "alice").splitlines())
    assert lines["networks"] == "10.0.0.0/8, ::1/128"
    assert lines["expires"] == "2100-01-31 00:00 UTC"
    assert lines["tpd"] == "none (tokens per day (UTC))"
    run("create", "bob", "--quiet")
    assert re.search(r"\nmodels +all\n", run("show", "bob"))


def test_an_expired_key_is_listed_as_such(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("create", "alice", "--quiet", "--expires", "1h")
    assert run("list").splitlines()[1].split()[2] == "enabled"
    later = time.time() + 3601
    monkeypatch.setattr(time, "time", lambda: later)
    assert run("list").splitlines()[1].split()[2] == "expired"


def test_rotate_prints_a_key_as_create_does(run: Run, data_dir: Path, service: Service | None) -> None:
    first = json.loads(run("create", "alice", "--json"))
    second = json.loads(run("rotate", "alice", "--overlap", "1h", "--json"))
    assert list(second) == list(first)
    assert second["id"] == first["id"]
    table = KeyTable(*stored(data_dir))
    for key in (first, second):
        assert table.authenticate_key(key["api_key"].encode()).name == "alice"
    assert re.fullmatch(r"DSK-\w{12}-\w{43}\n", run("rotate", "alice", "--quiet"))
    with pytest.raises(AuthenticationFailed):
        KeyTable(*stored(data_dir)).authenticate_key(second["api_key"].encode())
    assert "is good until 2" in run("rotate", "alice", "--overlap", "7d")
    assert re.search(r"old key +good until 2", run("show", "alice"))


def test_token_prints_a_token_and_nothing_else(run: Run, data_dir: Path, service: Service | None) -> None:
    run("create", "alice", "--quiet")
    token = run("token", "alice").strip()
    assert KeyTable(*stored(data_dir)).authenticate_key(token.encode()).name == "alice"
    scope = ["--models=a,b", "--allow=10.0.0.0/8", "--max-tokens=5", "--expires-in=15m"]
    made = json.loads(run("token", "alice", "--json", *scope))
    assert list(made) == ["token", "token_id", "expires"]
    principal = KeyTable(*stored(data_dir)).authenticate_key(made["token"].encode())
    assert (principal.models, principal.max_tokens, principal.token_id) == (
        frozenset("ab"),
        5,
        made["token_id"],
    )
    assert 890 < made["expires"] - time.time() <= 900


def test_a_backup_can_take_the_place_of_the_directory(
    run: Run, data_dir: Path, tmp_path: Path, service: Service | None
) -> None:
    key = run("create", "alice", "--quiet").strip()
    assert "as safe as a password" in run("backup", str(tmp_path / "backup"))
    assert KeyTable(*stored(tmp_path / "backup")).authenticate_key(key.encode()).name == "alice"
    run("list")


def test_there_must_be_something_to_back_up(run: Run, tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="There are no keys in"):
        run("backup", str(tmp_path / "backup"))
    assert not (tmp_path / "backup").exists()


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        ("--expires=soon", "'soon' is no time"),
        ("--expires=2030-13-01", "'2030-13-01' is no time"),
        ("--rps=fast", "invalid number (or default) value: 'fast'"),
        ("--tpm=1.5", "invalid number (or default) value: '1.5'"),
        ("--models=\udcff", "not printable"),
        ("--role=root", "invalid choice: 'root'"),
    ],
)
def test_an_option_that_can_not_be_read_is_named(
    run: Run, option: str, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run("create", "alice", option)
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0), ("90", 90), ("90s", 90), ("15m", 900), ("12h", 43_200), ("30d", 2_592_000)],
)
def test_durations(text: str, seconds: int) -> None:
    assert key_options.duration(text) == seconds


@pytest.mark.parametrize("text", ["", "d", "-1h", "1.5h", "1w", "1h30m", "9" * 10, "１"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is no duration"):
        key_options.duration(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("never", None),
        ("1970-01-02", 86_400),
        ("1970-01-02T00:00:01", 86_401),
        ("1970-01-02 00:00", 86_400),
        ("1970-01-02T00:00:00Z", 86_400),
        ("1970-01-02T02:00:00+02:00", 86_400),
    ],
)
def test_moments(text: str, seconds: int | None) -> None:
    assert key_options.moment(text) == seconds


def test_a_moment_may_be_so_far_away() -> None:
    found = key_options.moment("30d")
    assert found is not None
    assert abs(found - time.time() - 30 * 86_400) < 2


def test_an_unknown_key_is_one_sentence(run: Run, service: Service | None) -> None:
    run("create", "alice", "--quiet")
    with pytest.raises(SetupError, match=r"^There is no key with the id or name 'bob'\.$"):
        run("disable", "bob")


@pytest.mark.parametrize("command", ["create", "delete"])
def test_a_name_that_is_no_text_is_refused(
    run: Run, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(command, "\udcff")
    assert "not printable" in capsys.readouterr().err


def test_a_mistyped_directory_is_not_created(run: Run, data_dir: Path) -> None:
    with pytest.raises(SetupError, match="There are no keys in"):
        run("list")
    assert not data_dir.exists()


def test_help_needs_no_server_package() -> None:
    program = "import sys; sys.modules.update(msgspec=None); import deepseek_api_compat.cli.keys"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_data_directory_may_come_from_the_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "service.toml").write_text(f'[server]\ndata_dir = "{tmp_path}/elsewhere"\n')
    parser = argparse.ArgumentParser()
    keys.add_parser(parser.add_subparsers())
    args = parser.parse_args(["keys", "create", "a", "--quiet", "--config", str(tmp_path / "service.toml")])
    assert args.run(args) == 0
    assert capsys.readouterr().out.startswith("DSK-")
    assert (tmp_path / "elsewhere" / "deepseek.db").exists()


def test_audit_shows_what_was_done_newest_first(run: Run) -> None:
    run("create", "alice", "--quiet")
    run("update", "alice", "--budget", "2.5")
    run("delete", "alice")
    heading, *entries = run("audit").splitlines()
    assert heading.split()[:3] == ["TIME", "BY", "WHAT"]
    done = [re.split("  +", entry)[2] for entry in entries]
    assert done == ["keys.delete", "keys.update", "keys.create"]
    assert f"user {os.getuid()}" in entries[0]
    assert entries[1].endswith('alice {"budget": "2.5"}')
    [newest] = json.loads(run("audit", "--json", "--limit", "1"))
    assert (newest["op"], newest["key_name"]) == ("keys.delete", "alice")
