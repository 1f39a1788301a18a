"""Certificates: made for development, checked before use, noticed when their files change."""

from __future__ import annotations

import os
import ssl
import subprocess
from pathlib import Path

import pytest

from deepseek_api_compat.config import ServerSettings
from deepseek_api_compat.errors import SetupError
from deepseek_api_compat.security import certificates
from deepseek_api_compat.security.certificates import (
    CertificateFiles,
    LiveContext,
    development_certificate,
    development_names,
    fingerprint,
    tls_context,
)

NAMES = ["localhost", "127.0.0.1", "::1", "laptop.example.com"]


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Path]:
    return development_certificate(tmp_path / "tls", NAMES)


def test_it_is_for_all_names_and_private(made: tuple[Path, Path]):
    cert, key = made
    shown = subprocess.run(
        ["openssl", "x509", "-in", cert, "-noout", "-text"], capture_output=True, text=True
    )
    for name in (
        "DNS:localhost",
        "IP Address:127.0.0.1",
        "IP Address:0:0:0:0:0:0:0:1",
        "DNS:laptop.example.com",
    ):
        assert name in shown.stdout
    assert "CA:FALSE" in shown.stdout
    assert key.stat().st_mode & 0o777 == 0o600
    assert cert.parent.stat().st_mode & 0o777 == 0o700


def test_the_fingerprint_is_the_one_that_openssl_shows(made: tuple[Path, Path]):
    argv = ["openssl", "x509", "-in", made[0], "-noout", "-fingerprint", "-sha256"]
    shown = subprocess.run(argv, capture_output=True, text=True).stdout
    assert shown.strip().rpartition("=")[2] == fingerprint(made[0].read_bytes())


def test_a_good_one_is_kept(made: tuple[Path, Path]):
    before = [file.read_bytes() for file in made]
    assert development_certificate(made[0].parent, NAMES) == made
    assert [file.read_bytes() for file in made] == before


@pytest.mark.parametrize(
    "damage", ["other names", "near its end", "no key", "half a certificate", "another key"]
)
def test_one_that_will_not_do_is_made_anew(
    made: tuple[Path, Path], damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cert, key = made
    before = cert.read_bytes()
    names = NAMES
    if damage == "other names":
        names = [*NAMES, "192.0.2.7"]
    elif damage == "near its end":
        monkeypatch.setattr(certificates, "RENEW_SECONDS", certificates.DEVELOPMENT_DAYS * 86_400)
    elif damage == "no key":
        key.unlink()
    elif damage == "half a certificate":
        cert.write_bytes(before[: len(before) // 2])
    else:
        os.replace(development_certificate(tmp_path / "other", NAMES)[1], key)
    development_certificate(cert.parent, names)
    assert fingerprint(cert.read_bytes()) not in (fingerprint(before), "none")
    tls_context(cert, key)
    assert sorted(file.name for file in cert.parent.iterdir()) == [
        "certificate.pem",
        "key.pem",
        "request.cnf",
    ]


def test_names_that_are_none_are_left_out(tmp_path: Path):
    """What a host name may not be can't become a line of the request."""
    odd = ["a b", "x\nbasicConstraints = CA:TRUE", "*", "a,DNS:evil.example.com", "x" * 300, "-a", ""]
    cert, _ = development_certificate(tmp_path / "tls", ["localhost", *odd])
    assert "subjectAltName = DNS:localhost\n" in (cert.parent / "request.cnf").read_text()


@pytest.mark.parametrize(("host", "more"), [("127.0.0.1", 0), ("::1", 0), ("192.0.2.7", 1), ("0.0.0.0", 1)])
def test_the_names_of_a_service(host: str, more: int):
    usual = {*development_names(ServerSettings())}
    assert {"localhost", "127.0.0.1", "::1"} <= usual
    assert len({*development_names(ServerSettings(host=host))} - usual) <= more


def test_without_openssl_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SetupError, match="the openssl command, which is not installed"):
        development_certificate(tmp_path / "tls", NAMES)


def test_a_folder_that_can_not_be_made_is_one_sentence(tmp_path: Path):
    (tmp_path / "tls").write_text("")
    with pytest.raises(SetupError, match=r"Can't make a development certificate in .*: .*\."):
        development_certificate(tmp_path / "tls", NAMES)


def test_only_tls_13(made: tuple[Path, Path]):
    context = tls_context(*made)
    assert context.minimum_version == ssl.TLSVersion.TLSv1_3
    assert context.maximum_version == ssl.TLSVersion.MAXIMUM_SUPPORTED


# Renewal


def test_a_change_counts_when_it_is_complete(made: tuple[Path, Path], tmp_path: Path):
    files = CertificateFiles(str(made[0]), str(made[1]), tmp_path / "published.pem")
    first = files.publish()
    assert not files.changed()
    cert, key = development_certificate(tmp_path / "new", NAMES)
    os.replace(cert, made[0])
    assert not files.changed()  # whoever renews may be writing still
    os.replace(key, made[1])
    assert not files.changed()
    assert files.changed()
    assert files.publish() == fingerprint(made[0].read_bytes()) != first
    assert not files.changed()


def test_what_is_published_is_private_and_whole(made: tuple[Path, Path], tmp_path: Path):
    published = tmp_path / "run" / "tls.pem"
    published.parent.mkdir()
    files = CertificateFiles(str(made[0]), str(made[1]), published)
    files.publish()
    assert published.stat().st_mode & 0o777 == 0o600
    live = LiveContext(published)
    before = published.read_bytes()
    made[1].write_text("nonsense")
    with pytest.raises(SetupError, match="not valid PEM"):
        files.publish()
    assert published.read_bytes() == before
    assert [file.name for file in published.parent.iterdir()] == ["tls.pem"]
    assert not files.changed()  # said once: the same broken files are not tried again
    live.renew()
    published.unlink()
    with pytest.raises(SetupError, match="Can't read the TLS certificate"):
        live.renew()


def test_a_place_that_takes_no_file_is_one_sentence(made: tuple[Path, Path], tmp_path: Path):
    files = CertificateFiles(str(made[0]), str(made[1]), tmp_path / "gone" / "tls.pem")
    with pytest.raises(SetupError, match="Can't read or copy the TLS certificate"):
        files.publish()
