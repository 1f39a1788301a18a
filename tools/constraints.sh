#!/usr/bin/env bash
# Write constraints.txt: the exact versions that a fresh checkout installs, for each Python given
# (default: python3.10 python3.11). Run it to take newer versions, then run the tests.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
pythons=("$@")
[ ${#pythons[@]} -gt 0 ] || pythons=(python3.10 python3.11)
for python in "${pythons[@]}"; do
  "$python" -m venv "$work/venv-$python"
  "$work/venv-$python/bin/python" -m pip install --quiet --upgrade pip
  "$work/venv-$python/bin/python" -m pip install --quiet '.[embedded,formats]' --group dev
  "$work/venv-$python/bin/python" -m pip freeze --all --exclude deepseek-api-compat --exclude setuptools > "$work/$python.txt"
done
"$work/venv-${pythons[0]}/bin/python" - "$work" "${pythons[@]}" > constraints.txt <<'PY'
import pathlib
import sys

work, names = pathlib.Path(sys.argv[1]), sys.argv[2:]
pins = {name: dict(line.split("==") for line in (work / f"{name}.txt").read_text().split() if "==" in line) for name in names}
print("# Written by tools/constraints.sh: what a fresh checkout installs.")
for package in sorted({package for found in pins.values() for package in found}, key=str.lower):
    versions = {name.removeprefix("python"): found[package] for name, found in pins.items() if package in found}
    if len(set(versions.values())) == 1 and len(versions) == len(pins):
        print(f"{package}=={next(iter(versions.values()))}")
        continue
    newest = names[-1].removeprefix("python")
    for python, version in versions.items():
        sign = ">=" if python == newest else "=="
        print(f'{package}=={version} ; python_version {sign} "{python}"')
PY
