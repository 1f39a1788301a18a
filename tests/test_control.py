import json
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deepseek_api_compat import control
from deepseek_api_compat.errors import SetupError

Serve = Callable[[Path, bytes], "list[bytes]"]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start a service on a data directory that gives one fixed answer; returns what it receives."""
    threads: list[threading.Thread] = []

    def start(data_dir: Path, answer: bytes) -> list[bytes]:
        received: list[bytes] = []
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(control.control_socket_path(data_dir)))
        listener.listen()

        def run() -> None:
            with listener, listener.accept()[0] as connection, connection.makefile("rb") as lines:
                received.append(lines.readline())
                connection.sendall(answer)

        threads.append(threading.Thread(target=run))
        threads[-1].start()
        return received

    yield start
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()


@pytest.fixture
def long_dir(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / ("d" * 120)
    path.mkdir()
    yield path
    control.control_socket_path(path).unlink(missing_ok=True)


def test_a_request_and_its_answer(tmp_path: Path, serve: Serve) -> None:
    received = serve(tmp_path, control.encode_result([{"id": "a"}]))
    assert control.call(tmp_path, "keys.create", name="ü", rps=None) == [{"id": "a"}]
    assert json.loads(received[0]) == {"op": "keys.create", "name": "ü", "rps": None}
    assert control.decode_request(received[0]) == ("keys.create", {"name": "ü", "rps": None})


def test_the_services_refusal_is_raised_as_it_is(tmp_path: Path, serve: Serve) -> None:
    serve(tmp_path, control.encode_error(SetupError("There is no key 'x'.")))
    with pytest.raises(SetupError, match=r"^There is no key 'x'\.$"):
        control.call(tmp_path, "keys.delete", key="x")


@pytest.mark.parametrize("answer", [b"", b'{"ok": tr'])
def test_a_service_that_dies_meanwhile_is_one_sentence(tmp_path: Path, serve: Serve, answer: bytes) -> None:
    serve(tmp_path, answer)
    with pytest.raises(SetupError, match="stopped before it answered") as caught:
        control.call(tmp_path, "keys.list")
    assert not isinstance(caught.value, control.NotRunning)


def test_a_silent_service_is_one_sentence(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / control.SOCKET_NAME))
        listener.listen()
        with pytest.raises(SetupError, match="gave no answer"):
            control.call(tmp_path, "keys.list", timeout=0.05)


def test_no_service(tmp_path: Path) -> None:
    with pytest.raises(control.NotRunning):
        control.call(tmp_path, "keys.list")
    with pytest.raises(control.NotRunning):
        control.call(tmp_path / "missing", "keys.list")


def test_the_socket_of_a_killed_service_counts_as_none(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / control.SOCKET_NAME))
    with pytest.raises(control.NotRunning):
        control.call(tmp_path, "keys.list")


@pytest.mark.parametrize("line", [b"", b"nonsense", b"[]", b"{}", b'{"op": 3}', b"\xff", b'{"op": "x"'])
def test_a_bad_request_line_is_one_sentence(line: bytes) -> None:
    with pytest.raises(SetupError):
        control.decode_request(line)


def test_the_socket_is_in_the_data_directory_if_it_fits(tmp_path: Path) -> None:
    assert control.control_socket_path(tmp_path) == tmp_path / "control.sock"


def test_a_long_path_gets_a_short_private_one(long_dir: Path, tmp_path: Path, serve: Serve) -> None:
    path = control.control_socket_path(long_dir)
    assert len(os.fsencode(path)) <= control.MAX_PATH
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert path == control.control_socket_path(long_dir)
    assert path != control.control_socket_path(tmp_path / ("e" * 120))
    serve(long_dir, control.encode_result({}))
    assert control.call(long_dir, "metrics") == {}


def test_a_short_path_in_a_directory_open_to_others_is_refused(long_dir: Path) -> None:
    directory = control.control_socket_path(long_dir).parent
    directory.chmod(0o755)
    try:
        with pytest.raises(SetupError, match="only the user"):
            control.control_socket_path(long_dir)
    finally:
        directory.chmod(0o700)
