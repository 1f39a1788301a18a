"""The certificate that the service shows: checked before use, renewed while it runs, or made for development.

The supervisor reads the operator's two files, checks that they belong together, and publishes them as one
file in the data directory, from which workers load. So all workers show the same certificate, one that starts
in the middle of a renewal too, and a broken file never reaches any of them.

A development certificate is made by the openssl command, which every system with TLS has, rather than by a
package that is needed for nothing else.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import ssl
import subprocess
import tempfile
from collections.abc import Iterable
from ipaddress import ip_address
from pathlib import Path

from deepseek_api_compat.config import LOOPBACK, ServerSettings
from deepseek_api_compat.errors import SetupError
from deepseek_api_compat.store.datadir import reason

DEVELOPMENT_DAYS = 397  # the most that Apple's systems take
RENEW_SECONDS = 30 * 86_400  # before a development certificate ends

_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)
_HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,62}[A-Za-z0-9])?")
_REQUEST = """\
[req]
distinguished_name = name
x509_extensions = extensions
prompt = no
[name]
CN = deepseek-api development certificate
[extensions]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
subjectAltName = {names}
"""


def fingerprint(pem: bytes) -> str:
    """SHA-256 of the first certificate, as browsers show it: AB:CD:..."""
    found = _CERTIFICATE.search(pem)
    if found is None:
        return "none"
    digest = hashlib.sha256(ssl.PEM_cert_to_DER_cert(found[0].decode("latin-1"))).hexdigest().upper()
    return ":".join(digest[at : at + 2] for at in range(0, 64, 2))


def tls_context(cert: str | Path, key: str | Path | None = None) -> ssl.SSLContext:
    """A server's context that speaks TLS 1.3 and nothing older. `key` None: it is in the certificate's file.

    Raises SetupError, which says what is wrong with the files.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["http/1.1"])
    try:
        # An encrypted key would be asked for on the terminal; an empty password refuses it.
        context.load_cert_chain(cert, key, password=lambda: "")
    except ssl.SSLError as error:
        problem = _problem(error, Path(key or cert))
        raise SetupError(f"Can't use the TLS certificate {cert}: {problem}.") from None
    except OSError as error:
        raise SetupError(f"Can't read the TLS certificate {cert} or its key: {reason(error)}.") from None
    return context


def _problem(error: ssl.SSLError, key: Path) -> str:
    if error.reason == "KEY_VALUES_MISMATCH":
        return "the private key is another certificate's"
    if b"ENCRYPTED" in key.read_bytes():
        return "its private key is encrypted"
    return "it or its private key is not valid PEM"


class CertificateFiles:
    """The operator's files, and what is published of them. For one process only, the supervisor.

    Failure policy: files that can't be used change nothing; what was published before stays.
    """

    def __init__(self, cert: str, key: str, published: Path) -> None:
        self._cert = Path(cert)
        self._key = Path(key)
        self._published = published
        self._taken = self._last = self._stamp()

    def publish(self) -> str:
        """Give the files as they are now to the workers; returns the fingerprint. Raises SetupError."""
        self._taken = self._last = self._stamp()
        try:
            pem = self._cert.read_bytes().rstrip() + b"\n" + self._key.read_bytes()
            # A file of its own, mode 0600; checked before it takes the place of the one in use.
            with tempfile.NamedTemporaryFile(dir=self._published.parent, delete=False) as new:
                new.write(pem)
        except OSError as error:
            problem = f"{error.filename or self._published}: {reason(error)}"
            raise SetupError(f"Can't read or copy the TLS certificate: {problem}.") from None
        try:
            # The operator's files too: joined, a key in the certificate's file would hide a wrong one.
            tls_context(self._cert, self._key)
            tls_context(new.name)
            os.replace(new.name, self._published)
        except BaseException:
            os.unlink(new.name)
            raise
        return fingerprint(pem)

    def changed(self) -> bool:
        """Whether the files are others than those published last, and have been so for two questions.

        The second question gives whoever renews them the time to write both.
        """
        now, last = self._stamp(), self._last
        self._last = now
        return now != self._taken and now == last

    def _stamp(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(_stamp(path) for path in (self._cert, self._key))


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


class LiveContext:
    """A context for a listening socket, whose certificate can be another one for each new connection.

    `load_cert_chain` on the context in use would not do: it adds a key of another kind to the old one instead
    of replacing it, and fails half-way. Connections that are open keep what they began with.
    """

    def __init__(self, path: Path) -> None:
        """Raises SetupError."""
        self._path = path
        self._now = self.context = tls_context(path)
        self.context.sni_callback = self._choose

    def renew(self) -> None:
        """Read the file again. Raises SetupError and stays as it was."""
        self._now = tls_context(self._path)

    def _choose(self, connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        """Called at the beginning of each handshake, whether the client names a host or not."""
        connection.context = self._now


def development_names(server: ServerSettings) -> list[str]:
    """Host names and addresses under which a service with these settings is reached."""
    names = ["localhost", "127.0.0.1", "::1", socket.gethostname()]
    if server.host in ("0.0.0.0", "::"):  # noqa: S104
        names.append(own_address())
    elif server.host not in LOOPBACK:
        names.append(server.host)
    return list(dict.fromkeys(names))


def development_certificate(folder: Path, names: Iterable[str]) -> tuple[Path, Path]:
    """A self-signed certificate for `names` and its key, made unless `folder` has one good for 30 days more.

    Raises SetupError.
    """
    cert, key, made_for = folder / "certificate.pem", folder / "key.pem", folder / "request.cnf"
    wanted = _REQUEST.format(names=", ".join(_alternative_names(names)))
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if made_for.exists() and made_for.read_text() == wanted and _is_good(cert, key):
            return cert, key
        with tempfile.TemporaryDirectory(dir=folder) as name:
            new = Path(name)
            (new / made_for.name).write_text(wanted)
            os.close(os.open(new / key.name, os.O_CREAT | os.O_WRONLY, 0o600))
            _openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", new / key.name)
            sign = ("req", "-new", "-x509", "-sha256", "-days", DEVELOPMENT_DAYS)
            _openssl(*sign, "-config", new / made_for.name, "-key", new / key.name, "-out", new / cert.name)
            # What it was made for comes last: a pair that is half old is made anew.
            for file in (key, cert, made_for):
                os.replace(new / file.name, file)
    except OSError as error:
        raise SetupError(f"Can't make a development certificate in {folder}: {reason(error)}.") from None
    return cert, key


def _alternative_names(names: Iterable[str]) -> list[str]:
    found = []
    for name in names:
        try:
            found.append(f"IP:{ip_address(name)}")
        except ValueError:
            if _HOST_NAME.fullmatch(name):
                found.append(f"DNS:{name}")
    return found


def _is_good(cert: Path, key: Path) -> bool:
    try:
        tls_context(cert, key)
        _openssl("x509", "-in", cert, "-noout", "-checkend", RENEW_SECONDS)
    except SetupError:
        return False
    return True


def _openssl(*args: object) -> None:
    try:
        subprocess.run(
            ["openssl", *map(str, args)], check=True, capture_output=True, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError:
        raise SetupError(
            "A development certificate is made by the openssl command, which is not installed; "
            "install it, or give --tls-cert and --tls-key."
        ) from None
    except subprocess.CalledProcessError as error:
        last = error.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise SetupError(f"The openssl command failed: {last}") from None


def own_address() -> str:
    """This machine's address as others see it, from its routing table; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()


def published_place(data_dir: Path) -> Path:
    """Where workers find the certificate and its key, in one file."""
    return data_dir / "run" / "tls.pem"


def development_place(data_dir: Path) -> Path:
    """The folder of the development certificate."""
    return data_dir / "tls"
