"""`deepseek-api import`: files, keys and the report, and that nothing is half done."""

from __future__ import annotations

import hashlib
import json
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from deepseek_api_compat import config
from deepseek_api_compat.cli import main
from deepseek_api_compat.security.admin import open_admin
from deepseek_api_compat.security.keys import KeyTable

CONFIG = """
model_list:
  - model_name: chat
    litellm_params: {model: openai/x, api_base: "http://127.0.0.1:9/v1", api_key: "sk-up'stream"}
general_settings: {master_key: sk-master-1234}
"""
OLD = "sk-abcdefghijklmnopqrstuv"


class Place:
    """A folder with a LiteLLM configuration and keys, and where both go."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.source = folder / "litellm.yaml"
        self.source.write_text(CONFIG)
        self.keys = folder / "keys.csv"
        digest = hashlib.sha256(OLD.encode()).hexdigest()
        self.keys.write_text(f'token,key_alias,models,rpm_limit\n{digest},alice,"{{chat}}",5\n')
        self.data, self.output = folder / "data", folder / "made.toml"
        self.environment = folder / "made.env"
        self._capsys = capsys

    def run(self, *more: str) -> tuple[int, str, str]:
        args = ["import", "litellm", str(self.source), "--keys", str(self.keys), *more]
        code = main([*args, "--data-dir", str(self.data), "--output", str(self.output)])
        return code, *self._capsys.readouterr()

    def principal(self, key: str) -> Any:
        admin = open_admin(self.data)
        try:
            return KeyTable(admin.store.list(), admin.master).authenticate_key(key.encode())
        finally:
            admin.close()


@pytest.fixture
def place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Place:
    return Place(tmp_path, capsys)


def test_configuration_secrets_and_keys(place: Place) -> None:
    code, out, _ = place.run()
    assert code == 0
    [model] = config.load(str(place.output), environ={}).models
    assert model.engines[0].api_key_env == "IMPORTED_UPSTREAM_KEY_1"
    assert stat.S_IMODE(place.environment.stat().st_mode) == 0o600
    assert stat.S_IMODE(place.output.stat().st_mode) == 0o600
    assert f"serve --config {place.output} --data-dir {place.data}" in out
    assert OLD not in out
    alice = place.principal(OLD)
    assert (alice.name, alice.models, alice.limits.rpm) == ("alice", {"chat"}, 5)
    assert place.principal("sk-master-1234").role == "admin"


def test_what_a_shell_reads_is_the_upstreams_key(place: Place) -> None:
    import subprocess

    place.run()
    script = f'set -a; . {place.environment}; printf %s "$IMPORTED_UPSTREAM_KEY_1"'
    assert subprocess.run(["sh", "-c", script], capture_output=True, text=True).stdout == "sk-up'stream"


def test_again_and_nothing_doubles(place: Place) -> None:
    place.run()
    code, out, _ = place.run("--json")
    report = json.loads(out)
    assert code == 0
    assert report["counts"]["already here"] == 2
    admin = open_admin(place.data)
    assert len(admin.store.list()) == 2
    admin.close()


def test_what_is_there_is_not_replaced(place: Place) -> None:
    place.output.write_text("mine")
    code, _, err = place.run()
    assert (code, place.output.read_text(), place.data.exists()) == (1, "mine", False)
    assert "--force" in err
    assert place.run("--force")[0] == 0
    assert place.output.read_text() != "mine"


def test_a_folder_that_is_not_there(place: Place) -> None:
    place.output = place.output.parent / "none" / "made.toml"
    code, _, err = place.run()
    assert (code, place.data.exists(), "no such directory" in err) == (1, False, True)


def test_keys_under_another_master_key_and_nothing_is_written(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.run()
    for file in (place.output, place.environment):
        file.unlink()
    monkeypatch.setenv("DEEPSEEK_MASTER_KEY", "0" * 64)
    code, _, err = place.run()
    assert (code, place.output.exists(), "master key" in err) == (1, False, True)


def test_a_dry_run_writes_nothing(place: Place) -> None:
    code, out, _ = place.run("--dry-run")
    assert (code, place.output.exists(), place.data.exists()) == (0, False, False)
    assert "Nothing was written" in out


def test_broken_keys_and_nothing_is_written(place: Place) -> None:
    place.keys.write_text("token,key_alias\na\n")
    code, _, err = place.run()
    assert (code, place.output.exists(), place.data.exists()) == (1, False, False)
    assert "line 2" in err


def test_without_pyyaml_the_extra_is_named(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    code, _, err = place.run()
    assert (code, "deepseek-api-compat[import]" in err) == (1, True)
