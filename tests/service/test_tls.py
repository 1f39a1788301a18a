"""TLS as clients and attackers see it: the version, the certificate, and its renewal under streams."""

from __future__ import annotations

import asyncio
import os
import pty
import re
import shutil
import signal
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from deepseek_api_compat.security.certificates import development_certificate, fingerprint
from fakes.chat_upstream import DONE, STREAM_HEAD, ChatUpstream, event, frame
from fakes.configs import ENVIRONMENT, PATIENT, chat, upstream_model
from fakes.http_server import Peer, Request
from fakes.observe import log_of
from fakes.service import BIN, Service, eventually
from fakes.wire import text_of

NAMES = ["localhost", "127.0.0.1"]


def make_certificate(folder: Path) -> tuple[Path, Path]:
    cert, key = development_certificate(folder, NAMES)
    return cert, key


def install(made: tuple[Path, Path], place: Path) -> None:
    """Put a certificate where the service looks, as renewal programs do: each file replaced at once."""
    place.mkdir(exist_ok=True)
    for source, name in zip(made, ("cert.pem", "key.pem"), strict=True):
        shutil.copy(source, place / f"{name}.new")
        os.replace(place / f"{name}.new", place / name)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the operator keeps the certificate in use."""
    place = tmp_path_factory.mktemp("operator")
    install(make_certificate(tmp_path_factory.mktemp("first")), place)
    return place


@pytest.fixture(scope="module")
def service(start, chat_upstream: ChatUpstream, place: Path) -> Iterator[Service]:
    flags = ["--tls-cert", str(place / "cert.pem"), "--tls-key", str(place / "key.pem")]
    service = start(PATIENT + upstream_model("relay", chat_upstream), "--workers", "2", *flags)
    yield service
    assert service.stop() == 0
    assert "Traceback" not in log_of(service), log_of(service)
    assert not (service.data_dir / "run" / "tls.pem").exists()


def handshake(service: Service, *options: str) -> subprocess.CompletedProcess[str]:
    argv = ["openssl", "s_client", "-connect", f"127.0.0.1:{service.port}", *options]
    return subprocess.run(argv, input="", capture_output=True, text=True, timeout=60)


def is_refused(done: subprocess.CompletedProcess[str]) -> bool:
    """Whether the client said hello, and was shown no certificate."""
    assert re.search("SSL handshake has read [0-9]{1,2} bytes and written [1-9]", done.stdout), done
    return done.returncode != 0 and "no peer certificate available" in done.stdout


def shown(service: Service) -> str:
    """The fingerprint of the certificate that a new connection gets."""
    return fingerprint(ssl.get_server_certificate(("127.0.0.1", service.port)).encode())


def all_show(service: Service, made: tuple[Path, Path]) -> bool:
    """Whether all of 12 do; that both workers are among them is all but certain (1 - 2**-11)."""
    return {shown(service) for _ in range(12)} == {fingerprint(made[0].read_bytes())}


# Versions and ciphers


def test_tls_13_is_spoken(service: Service):
    said = handshake(service, "-tls1_3").stdout
    assert "TLSv1.3" in said
    assert "Secure Renegotiation IS NOT supported" in said


@pytest.mark.parametrize("version", ["-tls1", "-tls1_1", "-tls1_2"])
def test_older_versions_are_refused(service: Service, version: str):
    """At the lowest security level of the client, so that it is the server that refuses."""
    assert is_refused(handshake(service, version, "-cipher", "ALL:@SECLEVEL=0"))


@pytest.mark.parametrize("suite", ["TLS_AES_128_CCM_8_SHA256", "TLS_AES_128_CCM_SHA256"])
def test_weak_suites_are_refused(service: Service, suite: str):
    assert is_refused(handshake(service, "-tls1_3", "-ciphersuites", suite))


@pytest.mark.parametrize(
    "options", [["-noservername"], ["-servername", "evil.example.com"], ["-alpn", "h2,http/1.1"]]
)
def test_the_name_and_protocol_that_a_client_asks_for_change_nothing(service: Service, place: Path, options):
    said = handshake(service, "-tls1_3", *options).stdout
    assert fingerprint(said.encode()) == fingerprint((place / "cert.pem").read_bytes())
    assert "ALPN protocol: h2" not in said


@pytest.mark.parametrize(
    "data",
    [
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\xff\xff" + b"\0" * 600,
        b"\x80\x2e\x01\0\x02",
    ],
)
def test_plain_text_and_nonsense_get_no_http(service: Service, data: bytes):
    with socket.create_connection(("127.0.0.1", service.port), 60) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert b"HTTP" not in answer


# Renewal


def trusting(cert: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=cert)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    return context


def test_a_renewal_drops_no_stream(service: Service, upstream: ChatUpstream, place: Path, tmp_path: Path):
    """The stream goes on over its old connection, and new handshakes show the new certificate."""
    before, old = shown(service), trusting(place / "cert.pem")
    more = asyncio.Event()

    async def play(peer: Peer, _: Request) -> None:
        await peer.send(STREAM_HEAD + frame(event("before")))
        await more.wait()
        await peer.send(frame(event("after")) + frame(DONE) + b"0\r\n\r\n")

    upstream.play(play)
    body = chat("relay", stream=True)
    with service.client(verify=old) as http, http.stream("POST", "/v1/chat/completions", json=body) as answer:
        data = answer.iter_bytes()
        received = next(data)
        new = make_certificate(tmp_path)
        install(new, place)
        eventually(lambda: all_show(service, new), what="the new certificate")
        assert shown(service) != before
        upstream.run(more.set)
        received += b"".join(data)
    assert text_of(received) == "beforeafter"
    with service.client(verify=trusting(new[0])) as http:
        assert http.get("/v1/models").status_code == 200
    with (
        service.client(verify=old) as http,
        pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"),
    ):
        http.get("/v1/models")


def test_sighup_renews_at_once(service: Service, place: Path, tmp_path: Path):
    """Even where the times of the files do not change."""
    workers = service.workers()
    new = make_certificate(tmp_path)
    times = [
        (file.stat().st_atime_ns, file.stat().st_mtime_ns) for file in (place / "cert.pem", place / "key.pem")
    ]
    install(new, place)
    for name, time_of in zip(("cert.pem", "key.pem"), times, strict=True):
        os.utime(place / name, ns=time_of)
    service.process.send_signal(signal.SIGHUP)
    eventually(lambda: all_show(service, new), what="the new certificate")
    assert service.workers() == workers


def complaints(service: Service) -> int:
    return log_of(service).count("The certificate in use stays.")


def broken(place: Path, kind: str, other: tuple[Path, Path]) -> None:
    if kind == "half a certificate":
        pem = (place / "cert.pem").read_bytes()
        (place / "cert.pem").write_bytes(pem[: len(pem) // 2])
    elif kind == "another key":
        shutil.copy(other[1], place / "key.pem")
    elif kind == "another key, and the right one beside the certificate":
        (place / "cert.pem").write_bytes((place / "cert.pem").read_bytes() + (place / "key.pem").read_bytes())
        shutil.copy(other[1], place / "key.pem")
    elif kind == "an encrypted key":
        argv = ["openssl", "ec", "-in", str(place / "key.pem"), "-out", str(place / "key.pem"), "-aes128"]
        subprocess.run([*argv, "-passout", "pass:secret"], check=True, capture_output=True)
    else:
        (place / "key.pem").unlink()


@pytest.mark.parametrize(
    "kind",
    [
        "half a certificate",
        "another key",
        "another key, and the right one beside the certificate",
        "an encrypted key",
        "no key",
    ],
)
def test_a_broken_renewal_keeps_the_old_certificate(service: Service, place: Path, tmp_path: Path, kind: str):
    """It is logged once, and a worker that is started meanwhile shows the old certificate too."""
    before = shown(service)
    said = complaints(service)
    saved = tmp_path / "saved"
    shutil.copytree(place, saved)
    broken(place, kind, make_certificate(tmp_path / "other"))
    service.process.send_signal(signal.SIGHUP)
    try:
        eventually(lambda: complaints(service) > said, what="the complaint")
        old_worker = service.workers()[0]
        os.kill(old_worker, signal.SIGKILL)
        eventually(lambda: len(set(service.workers()) - {old_worker}) == 2, what="another worker")
        assert {shown(service) for _ in range(12)} == {before}
    finally:
        install((saved / "cert.pem", saved / "key.pem"), place)
    assert {shown(service) for _ in range(12)} == {before}


# At the start


def refusal(tmp_path: Path, *args: object) -> str:
    """What a start that fails says."""
    argv = [BIN / "deepseek-api", "serve", "--port", "0", "--data-dir", tmp_path / "data", *args]
    done = subprocess.run(list(map(str, argv)), capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("half a certificate", "it or its private key is not valid PEM"),
        ("another key", "the private key is another certificate's"),
        ("an encrypted key", "its private key is encrypted"),
    ],
)
def test_a_broken_certificate_ends_the_start(tmp_path: Path, kind: str, sentence: str):
    install(make_certificate(tmp_path / "made"), tmp_path / "place")
    broken(tmp_path / "place", kind, make_certificate(tmp_path / "other"))
    place = tmp_path / "place"
    said = refusal(tmp_path, "--tls-cert", place / "cert.pem", "--tls-key", place / "key.pem")
    assert sentence in said


def test_require_tls_refuses_plain_text_on_a_network(tmp_path: Path):
    (tmp_path / "config.toml").write_text("[server]\nrequire_tls = true\n")
    said = refusal(tmp_path, "--config", tmp_path / "config.toml", "--host", "0.0.0.0")
    assert "server.require_tls forbids plain text on 0.0.0.0" in said


def test_a_development_certificate_and_its_own_key_files_exclude_each_other(tmp_path: Path):
    cert, key = make_certificate(tmp_path)
    said = refusal(tmp_path, "--tls-dev", "--tls-cert", cert, "--tls-key", key)
    assert "server.tls_dev makes a certificate itself" in said


# The development certificate


def test_a_development_certificate(start, upstream: ChatUpstream):
    """Clients that are told to trust it can call the service by any of its names, and keep trusting it."""
    service = start(PATIENT + upstream_model("relay", upstream), "--tls-dev")
    cert = service.data_dir / "tls" / "certificate.pem"
    assert f"SHA-256 {fingerprint(cert.read_bytes())}" in service.output
    assert f"curl --cacert {cert} https://127.0.0.1:{service.port}/v1/" in service.output
    for name in ("127.0.0.1", "localhost"):
        answer = httpx.get(f"https://{name}:{service.port}/health", verify=trusting(cert))
        assert answer.status_code == 200
    assert (service.data_dir / "tls" / "key.pem").stat().st_mode & 0o777 == 0o600
    assert (service.data_dir / "run" / "tls.pem").stat().st_mode & 0o777 == 0o600
    made = cert.read_bytes()
    assert service.stop() == 0
    again = start(PATIENT + upstream_model("relay", upstream), "--tls-dev", data_dir=service.data_dir)
    assert cert.read_bytes() == made
    assert again.stop() == 0


def test_closing_the_terminal_ends_the_service(upstream: ChatUpstream, tmp_path: Path):
    """SIGHUP renews; but a service in a terminal that goes away leaves with it, as it does without TLS."""
    (tmp_path / "config.toml").write_text(PATIENT + upstream_model("relay", upstream))
    output, log = tmp_path / "output", tmp_path / "data" / "logs" / "gateway.log"
    ours, terminal = pty.openpty()
    argv = [BIN / "deepseek-api", "serve", "--port", "0", "--tls-dev", "--config", tmp_path / "config.toml"]
    argv += ["--data-dir", tmp_path / "data"]
    environment = {**os.environ, **ENVIRONMENT}
    with output.open("w") as file:
        process = subprocess.Popen(
            list(map(str, argv)), stdin=terminal, stdout=file, stderr=file, env=environment
        )
    os.close(terminal)
    try:
        eventually(lambda: "Try it" in output.read_text(), 60, "the start")
        process.send_signal(signal.SIGHUP)
        eventually(lambda: "are shown the certificate" in log.read_text(), what="a renewal")
        assert process.poll() is None
        os.close(ours)
        process.send_signal(signal.SIGHUP)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
