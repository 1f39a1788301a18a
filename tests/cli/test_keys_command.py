"""`deepseek-api keys`, directly and through a service."""

import argparse
import json
import re
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from deepseek_api_compat import control
from deepseek_api_compat.cli import keys
from deepseek_api_compat.errors import SetupError
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
    assert shown == [("default", "disabled", "alice"), ("2.5", "enabled", "bob")]
    assert lines[1][0] == id
    assert run("enable", id) == f"Key 'alice' (id {id}) is enabled.\n"
    assert run("delete", "bob").endswith("is deleted.\n")
    (listed,) = json.loads(run("list", "--json"))
    assert (listed["id"], listed["enabled"]) == (id, True)


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
