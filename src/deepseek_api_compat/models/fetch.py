"""Downloads one file over HTTP: with progress, checked, and under its name only when complete.

Proxies come from the usual variables (httpx reads HTTP_PROXY, HTTPS_PROXY, NO_PROXY). A download that
breaks off goes on from where it stopped (Range) as long as every new try brings something. When it fails for
good nothing is left, except the `.part` of a large file with a known hash, which the next run continues.
"""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import msgspec

from deepseek_api_compat.errors import ModelError
from deepseek_api_compat.models import shelf
from deepseek_api_compat.models.progress import Progress

WORTH_CONTINUING = 256_000_000
_SHA256 = re.compile(r'"?([0-9a-f]{64})"?')


class Remote(msgspec.Struct, frozen=True):
    """A file to fetch. `path` is its place below the target folder; bytes and SHA-256 where known.

    remedy: what a person can do when `site` can't be reached or refuses; ends the sentence.
    """

    url: str
    path: str
    site: str
    remedy: str
    bytes: int | None = None
    sha256: str | None = None
    headers: dict[str, str] = {}


def client() -> httpx.Client:
    """An HTTP client with this module's timeouts. Raises ModelError if a proxy variable makes no sense."""
    try:
        return httpx.Client(timeout=httpx.Timeout(30, connect=10), follow_redirects=True)
    except (ValueError, httpx.InvalidURL, OSError) as error:
        raise ModelError(f"The proxy or certificate settings can't be used: {error}.") from None


def get(http: httpx.Client, url: str, remote: Remote) -> httpx.Response:
    """A small answer (a listing), read whole; failures are told as for `remote`."""
    try:
        response = http.get(url, headers=remote.headers)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise unreachable(remote, error) from None
    _check_status(response, remote)
    return response


def download(http: httpx.Client, remote: Remote, target: Path, progress: Progress) -> str:
    """Fetch `remote` to `target`; returns its SHA-256. Raises ModelError, one sentence."""
    part = target.with_name(target.name + shelf.PART)
    with shelf.on_disk(target.parent):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            sha256 = _Transfer(http, remote, part, progress).run()
            shelf.publish(part, target)
        except OSError:
            part.unlink(missing_ok=True)
            raise
        except BaseException:
            _discard_unless_worth_continuing(part, remote)
            raise
    return sha256


class _Transfer:
    """Fills `part`, in as many tries as bring something."""

    def __init__(self, http: httpx.Client, remote: Remote, part: Path, progress: Progress) -> None:
        self._http, self._remote, self._part, self._progress = http, remote, part, progress
        self._expected = remote.sha256

    def run(self) -> str:
        while True:
            before = self._have()
            try:
                if before == 0 or before != self._remote.bytes:
                    self._request(before)
                return self._verify()
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                if self._have() <= before:
                    raise unreachable(self._remote, error) from None

    def _have(self) -> int:
        # Without a hash to check at the end, two halves of different files could be joined unnoticed.
        if self._expected is None or not self._part.exists():
            return 0
        return self._part.stat().st_size

    def _request(self, have: int) -> None:
        headers = {**self._remote.headers, "accept-encoding": "identity"}
        if have:
            headers["range"] = f"bytes={have}-"
        with self._http.stream("GET", self._remote.url, headers=headers) as response:
            if have and response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
                return  # what is there is already too long or complete: the hash will tell
            _check_status(response, self._remote)
            self._expected = self._expected or _linked_sha256(response)
            if response.status_code != httpx.codes.PARTIAL_CONTENT:
                have = 0
            self._save(response, have)

    def _save(self, response: httpx.Response, have: int) -> None:
        rest = int(response.headers.get("content-length") or (self._remote.bytes or 0) - have)
        shelf.need_space(self._part.parent, rest, self._remote.path)
        with (
            self._progress.bar(self._remote.path, have + rest) as bar,
            self._part.open("ab" if have else "wb") as file,
        ):
            bar.start_at(have)
            for chunk in response.iter_raw():
                file.write(chunk)
                bar.add(len(chunk))

    def _verify(self) -> str:
        remote, found = self._remote, self._part.stat().st_size
        if self._expected is None and remote.bytes is not None and found != remote.bytes:
            self._part.unlink()
            raise ModelError(
                f"{remote.path} from {remote.site} has {found:,} bytes, not {remote.bytes:,}; try again."
            )
        sha256 = shelf.sha256_of(self._part)
        if self._expected not in (None, sha256):
            self._part.unlink()
            raise ModelError(
                f"{remote.path} from {remote.site} is not the expected file (its SHA-256 differs), so it was "
                "deleted; try again, and if that fails too use another mirror."
            )
        return sha256


def unreachable(remote: Remote, error: Exception) -> ModelError:
    why = "it did not answer in time" if isinstance(error, httpx.TimeoutException) else str(error).rstrip(".")
    return ModelError(
        f"Can't fetch {remote.path} from {remote.site}: {why or type(error).__name__}; {remote.remedy}."
    )


def _check_status(response: httpx.Response, remote: Remote) -> None:
    status = response.status_code
    if status < 300:
        return
    site = f"{remote.site} ({response.url.host})"
    if status in (401, 403):
        why = f"{site} refuses access (HTTP {status}); if the repository asks for a token, set HF_TOKEN"
    elif status == 404:
        why = f"{site} does not have it (HTTP 404); a mirror may lack it, so try the other source (--from)"
    else:
        why = f"{site} answered HTTP {status}; try again later, or {remote.remedy}"
    raise ModelError(f"Can't fetch {remote.path}: {why}.")


def _linked_sha256(response: httpx.Response) -> str | None:
    """The hash that Hugging Face names, on the answer that redirects to the storage of large files."""
    for answer in (*response.history, response):
        match = _SHA256.fullmatch(answer.headers.get("x-linked-etag", ""))
        if match:
            return match[1]
    return None


def _discard_unless_worth_continuing(part: Path, remote: Remote) -> None:
    if part.exists() and (remote.sha256 is None or part.stat().st_size < WORTH_CONTINUING):
        part.unlink()
