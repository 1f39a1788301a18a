"""Make the environments of tests/migration/environments.toml in .venv-migration, those not there yet.

    python tools/migration_envs.py [--freeze]

With --freeze all are made anew with the newest of what their packages need, whose versions then go into
tests/migration/constraints.txt.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".venv-migration"
WANTED = ROOT / "tests" / "migration" / "environments.toml"
CONSTRAINTS = WANTED.with_name("constraints.txt")
AT_A_TIME = 2  # they unpack more than they download


def pip(environment: Path, *arguments: str) -> str:
    """What pip, of the Python that runs this, prints for that environment. Exits where it fails."""
    argv = [sys.executable, "-m", "pip", "--python", str(environment / "bin" / "python"), *arguments]
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"migration_envs: {environment.name} could not be made:\n{done.stderr}")
    return done.stdout


def make(name: str, requirements: list[str], *, constrained: bool) -> str:
    """Make one environment where it is not as wanted; returns what was done."""
    environment, stamp = FOLDER / name, FOLDER / name / "made-of"
    wanted = "\n".join([sys.version, *requirements, CONSTRAINTS.read_text()])
    if stamp.exists() and stamp.read_text() == wanted:
        return f"{name}: there"
    shutil.rmtree(environment, ignore_errors=True)
    venv.create(environment, with_pip=False, symlinks=True)
    options = ["-c", str(CONSTRAINTS)] if constrained else []
    pip(environment, "install", "--quiet", "--no-compile", *options, *requirements)
    stamp.write_text(wanted)
    return f"{name}: made"


def freeze(names: list[str]) -> str:
    """The versions in all environments, without what environments.toml says and what differs between them."""
    found: dict[str, set[str]] = {}
    for name in names:
        for line in pip(FOLDER / name, "freeze").split():
            package, version = line.split("==")
            found.setdefault(package, set()).add(version)
    said = WANTED.read_text()
    pins = [
        # Python 3.10 takes what still supports it.
        f'{package}=={versions.pop()} ; python_version >= "3.11"'
        for package, versions in sorted(found.items(), key=lambda item: item[0].lower())
        if len(versions) == 1 and f'"{package}==' not in said
    ]
    return "\n".join(["# Written by tools/migration_envs.py --freeze.", *pins, ""])


def main() -> None:
    wanted = tomllib.loads(WANTED.read_text())
    environments: dict[str, list[str]] = wanted["environments"]
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    for name in wanted["ours"]:
        environments[name] += needed
    if anew := "--freeze" in sys.argv[1:]:
        shutil.rmtree(FOLDER, ignore_errors=True)
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        for done in pool.map(lambda item: make(*item, constrained=not anew), environments.items()):
            print(done, flush=True)
    if anew:
        CONSTRAINTS.write_text(freeze([*environments]))


if __name__ == "__main__":
    main()
