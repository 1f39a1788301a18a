import resource
import stat
from pathlib import Path

import pytest

from deepseek_api_compat.errors import ConfigError, SetupError
from deepseek_api_compat.security.master import (
    FILE_NAME,
    load_master_key,
    master_id,
    master_key_place,
    write_master_key,
)


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEEPSEEK_MASTER_KEY", raising=False)


def test_it_is_made_once_private_and_random(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    master = load_master_key(tmp_path, create=True)
    path = tmp_path / FILE_NAME
    assert path.read_text() == master.hex() + "\n"
    assert len(master) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_master_key(tmp_path, create=True) == master
    assert load_master_key(tmp_path, create=False) == master
    assert load_master_key(tmp_path / "other", create=True) != master


def test_nothing_else_is_left_behind(tmp_path: Path) -> None:
    load_master_key(tmp_path, create=True)
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644, 0o777])
def test_a_file_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    load_master_key(tmp_path, create=True)
    (tmp_path / FILE_NAME).chmod(mode)
    with pytest.raises(SetupError, match=rf"is open to others \(mode 0{mode:o}\): run chmod 600"):
        load_master_key(tmp_path, create=True)


def test_a_lost_file_is_not_replaced_silently(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="is missing"):
        load_master_key(tmp_path, create=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"abc", b"00" * 31, b"00" * 33, b"\xff\xfe", b"zz" * 32])
def test_a_damaged_file_is_refused_and_kept(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / FILE_NAME
    path.touch(mode=0o600)
    path.write_bytes(content)
    with pytest.raises(SetupError, match="is damaged"):
        load_master_key(tmp_path, create=True)
    assert path.read_bytes() == content


def test_a_full_disk_leaves_no_file(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(SetupError, match="Can't create the master key"):
            load_master_key(tmp_path, create=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_the_variable_wins_and_no_file_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSEEK_MASTER_KEY", "ab" * 32)
    assert load_master_key(tmp_path, create=True) == b"\xab" * 32
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_variable_is_refused_unseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSEEK_MASTER_KEY", "hunter2")
    with pytest.raises(ConfigError, match="DEEPSEEK_MASTER_KEY must be 64 hex digits") as caught:
        load_master_key(tmp_path, create=True)
    assert "hunter2" not in str(caught.value)


def test_its_id_tells_it_from_others_and_nothing_else() -> None:
    assert master_id(bytes(32)) == master_id(bytes(32)) != master_id(b"a" * 32)
    assert len(bytes.fromhex(master_id(bytes(32)))) == 8


def test_its_place_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert master_key_place(tmp_path) == str(tmp_path / FILE_NAME)
    monkeypatch.setenv("DEEPSEEK_MASTER_KEY", "ab" * 32)
    assert master_key_place(tmp_path) == "DEEPSEEK_MASTER_KEY"


def test_a_copy_is_private_and_replaces_nothing(tmp_path: Path) -> None:
    write_master_key(tmp_path, b"a" * 32)
    write_master_key(tmp_path, b"b" * 32)
    assert stat.S_IMODE((tmp_path / FILE_NAME).stat().st_mode) == 0o600
    assert load_master_key(tmp_path, create=False) == b"a" * 32
