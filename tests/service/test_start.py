"""Starting: quick, and when it can't, one sentence that says why."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fakes.chat_upstream import ChatUpstream
from fakes.configs import ENGINE, ENVIRONMENT, PATIENT, TINY, chat, upstream_model
from fakes.observe import alive, descendants, ready
from fakes.service import BIN, Service, eventually
from fakes.wire import call, request

MODEL = Path("~/.cache/deepseek-api/models").expanduser() / TINY / f"{TINY}-Q4_0.gguf"


def refusal(*args: str | Path, code: int = 1, timeout: float = 60) -> str:
    """What `serve ARGS` says on standard error as it gives up: one line, and nothing else anywhere."""
    argv = [BIN / "deepseek-api", "serve", *args]
    environment = {**os.environ, **ENVIRONMENT}
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=timeout, env=environment)
    assert ended.returncode == code, ended
    assert ended.stdout == "", ended
    [line] = ended.stderr.splitlines()
    assert line.startswith("deepseek-api: ")
    assert line.endswith(".")
    assert line.count(". ") < 3
    return line.removeprefix("deepseek-api: ")


# Refusals


def test_a_taken_port(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        said = refusal("--port", port, "--data-dir", tmp_path / "data")
    assert port in said
    assert "in use" in said
    assert "--port" in said
    assert not (tmp_path / "data").exists()


def test_a_port_below_1024():
    """Said to a user without the right to it, which root gives up for this."""
    with open("/proc/sys/net/ipv4/ip_unprivileged_port_start") as limit:
        if int(limit.read()) <= 80:
            pytest.skip("this machine lets everybody")
    program = (
        "import os\n"
        "'localhost'.encode('idna')\n"  # loaded on first use, which may be too late
        "from deepseek_api_compat.gateway.listen import bind\n"
        "from deepseek_api_compat.errors import SetupError\n"
        "if os.getuid() == 0: os.setgid(65534), os.setuid(65534)\n"
        "try: bind('127.0.0.1', 80)\n"
        "except SetupError as error: print(error)\n"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert "1024" in said.stdout, said


@pytest.mark.parametrize("host", ["192.0.2.7", "no.such.host.invalid", "999.1.1.1"])
def test_an_address_that_is_not_ours(tmp_path: Path, host: str):
    said = refusal("--host", host, "--port", "0", "--data-dir", tmp_path / "data")
    assert host in said


BAD_MODELS = {
    "empty": b"",
    "text": b"this is no model" * 1000,
    "magic-only": b"GGUF",
    "zeros": bytes(100_000),
    "huge-counts": b"GGUF\x03\0\0\0" + b"\xff" * 16,
}


@pytest.mark.parametrize("content", BAD_MODELS.values(), ids=list(BAD_MODELS))
def test_a_corrupt_model_file(tmp_path: Path, content: bytes):
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    said = refusal("--port", "0", "--model-path", file, "--data-dir", tmp_path / "data")
    assert str(file) in said


@pytest.mark.parametrize("share", [0.3, 0.999])
def test_a_model_file_cut_short(tmp_path: Path, share: float):
    """As after a broken download: the header is whole, the weights are not."""
    file = tmp_path / "model.gguf"
    size = int(MODEL.stat().st_size * share)
    with MODEL.open("rb") as whole:
        file.write_bytes(whole.read(size))
    said = refusal("--port", "0", "--model-path", file, "--data-dir", tmp_path / "data")
    assert str(file) in said


def test_a_missing_model(tmp_path: Path):
    for name in (str(tmp_path / "none.gguf"), "no-such-model"):
        said = refusal("--port", "0", "--model-path", name, "--data-dir", tmp_path / "data")
        assert name in said


BAD_CONFIGS = {
    "unknown-key": ("[server]\nprot = 8000\n", "prot"),
    "unknown-section": ("[sever]\nport = 8000\n", "sever"),
    "unknown-engine-key": (
        '[[models]]\nname = "x"\n[[models.engines]]\nkind = "llamacpp"\npth = "x"\n',
        "pth",
    ),
    "wrong-type": ('[server]\nworkers = "many"\n', "workers"),
    "out-of-range": ("[server]\nworkers = 0\n", "workers"),
    "not-toml": ("[server\nport = 8000\n", "TOML"),
    "not-text": ("\udcff\udcfe", "TOML"),
    "no-engine": ('[[models]]\nname = "x"\n', "engine"),
    "unknown-kind": ('[[models]]\nname = "x"\n[[models.engines]]\nkind = "abacus"\n', "kind"),
    "no-base-url": ('[[models]]\nname = "x"\n[[models.engines]]\nkind = "openai"\n', "base_url"),
    "bad-base-url": (
        '[[models]]\nname = "x"\n[[models.engines]]\nkind = "openai"\nbase_url = "localhost:1"\n',
        "base_url",
    ),
    "bad-port-in-url": (
        '[[models]]\nname = "x"\n[[models.engines]]\nkind = "openai"\nbase_url = "http://a:999999/v1"\n',
        "base_url",
    ),
    "unset-key": (
        '[[models]]\nname = "x"\n[[models.engines]]\nkind = "openai"\n'
        'base_url = "http://127.0.0.1:1/v1"\napi_key_env = "NO_SUCH_VARIABLE"\n',
        "NO_SUCH_VARIABLE",
    ),
    "twice": (
        '[[models]]\nname = "x"\naliases = ["x"]\n[[models.engines]]\nkind = "openai"\nbase_url = "http://a"\n',
        "twice",
    ),
}


@pytest.mark.parametrize(("text", "word"), BAD_CONFIGS.values(), ids=list(BAD_CONFIGS))
def test_a_wrong_configuration(tmp_path: Path, text: str, word: str):
    file = tmp_path / "config.toml"
    file.write_bytes(text.encode(errors="surrogateescape"))
    said = refusal("--port", "0", "--config", file, "--data-dir", tmp_path / "data")
    assert word in said


def test_a_missing_configuration(tmp_path: Path):
    assert "none.toml" in refusal("--config", tmp_path / "none.toml")


def test_a_wrong_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DEEPSEEK_SERVER_PROT", "8000")
    assert "DEEPSEEK_SERVER_PROT" in refusal("--port", "0", "--data-dir", tmp_path / "data")


def test_a_data_directory_that_is_none(tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("x")
    for place in (file, file / "below", Path("/proc/nothing")):
        assert str(place) in refusal("--port", "0", "--data-dir", place)
    assert file.read_text() == "x"


def test_a_data_directory_full_of_somebody_elses_things(tmp_path: Path):
    """Damaged files of ours are named, not overwritten."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "master.key").write_text("not a key")
    said = refusal("--port", "0", "--data-dir", data, "--model-path", MODEL)
    assert "master.key" in said
    assert (data / "master.key").read_text() == "not a key"


def test_missing_tls_files(tmp_path: Path):
    none = tmp_path / "none.pem"
    said = refusal("--port", "0", "--tls-cert", none, "--tls-key", none, "--data-dir", tmp_path / "data")
    assert str(none) in said


# Successes


def test_a_failed_start_uses_up_no_key(tmp_path: Path):
    """The key is shown once; that must be a time when the service works."""
    broken = tmp_path / "broken.gguf"
    with MODEL.open("rb") as whole:
        broken.write_bytes(whole.read(10_000_000))
    refusal("--port", "0", "--model-path", broken, "--data-dir", tmp_path / "data")
    service = Service(tmp_path / "data", "--model-path", TINY)
    try:
        assert call(service.port, request("GET", "/v1/models", b"", service.key)).status == 200
    finally:
        assert service.stop() == 0


def secrets_in(folder: Path, key: str) -> list[Path]:
    """Files that hold the key, or its random part."""
    parts = [key.encode(), key.rsplit("-", 1)[1].encode()]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [path for path in files if any(part in path.read_bytes() for part in parts)]


def test_the_example_call_works_when_pasted_and_the_key_is_nowhere(start):
    if shutil.which("curl") is None:
        pytest.skip("no curl here")
    service = start(PATIENT + ENGINE)
    assert service.output.count(service.key) == 2, "in its line, and in the example"
    example = service.output[service.output.index("curl ") :]
    pasted = subprocess.run(["bash", "-c", example], capture_output=True, text=True, timeout=60)
    assert '"content"' in pasted.stdout, pasted

    assert secrets_in(service.data_dir, service.key) == []
    for path in (service.data_dir, service.data_dir / "run"):
        assert path.stat().st_mode & 0o077 == 0, path
    for path in service.data_dir.rglob("*"):
        if path.is_file() and path.parent == service.data_dir:
            assert path.stat().st_mode & 0o077 == 0, path
    assert service.stop() == 0

    again = start(PATIENT + ENGINE, data_dir=service.data_dir)
    assert again.key is None
    assert service.key not in again.output
    assert call(again.port, request("GET", "/v1/models", b"", service.key)).status == 200
    assert again.stop() == 0


def test_the_second_start_prepares_nothing(engine_service: Service, tmp_path: Path):
    """The first one of this session has prepared the model."""
    before = MODEL.stat()
    service = Service(tmp_path / "data", "--model-path", TINY)
    eventually(lambda: ready(service) == 200)
    assert service.stop() == 0
    assert (MODEL.stat().st_ino, MODEL.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_start_server_is_serve_on_all_addresses(tmp_path: Path):
    service = Service(tmp_path / "data", "--model-path", TINY, "--workers", "2", command="start_server")
    try:
        assert re.search(r"network +http://", service.output)
        assert len(service.workers()) == 2
        body = chat("deepseek-v3", max_tokens=2)
        assert call(service.port, request("POST", "/v1/chat/completions", body, service.key)).status == 200
    finally:
        assert service.stop() == 0


def test_nothing_is_left_of_an_interrupted_start(tmp_path: Path):
    """Ctrl-C at any stage before it is ready: no process, no complaint; the next start works."""
    data = tmp_path / "data"
    argv = [BIN / "deepseek-api", "serve", "--port", "0", "--data-dir", data, "--model-path", TINY]
    for stage in ("serve.lock", "control.sock", "run", "logs/engine-0-0.log", "run/engines/0-0.sock"):
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        eventually((data / stage).exists, what=stage)
        children = descendants(process.pid)
        process.send_signal(signal.SIGINT)
        _, complaint = process.communicate(timeout=60)
        assert process.returncode in (0, 130), (stage, complaint)
        assert complaint == "", stage
        eventually(lambda children=children: not any(map(alive, children)), what="no process left")
        for trace in ("control.sock", "run", "logs"):
            remove(data / trace)
    service = Service(data, "--model-path", TINY)
    try:
        key = service.key or service.new_key()
        assert call(service.port, request("GET", "/v1/models", b"", key)).status == 200
    finally:
        assert service.stop() == 0


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def test_an_upstream_may_come_later(start):
    """The service starts without it, says so, and serves when it is there."""
    own = ChatUpstream()
    own.health = 500
    try:
        service = start(PATIENT + upstream_model("relay", own))
        assert ready(service) == 503
        own.health = 200
        eventually(lambda: ready(service) == 200, what="ready")
    finally:
        own.close()
