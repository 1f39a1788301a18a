import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepseek_api_compat.errors import SetupError
from deepseek_api_compat.store.datadir import make_data_dir


@pytest.fixture
def unwritable() -> Iterator[Path]:
    """A directory that this process can't write to, even if the tests run as root."""
    root = os.geteuid() == 0
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    directory.chmod(0o555)
    if root:
        os.setresuid(65534, 65534, 0)
    try:
        yield directory
    finally:
        if root:
            os.setresuid(0, 0, 0)
        directory.chmod(0o700)
        directory.rmdir()


def test_a_new_data_directory_is_private(tmp_path: Path) -> None:
    make_data_dir(tmp_path / "new" / "data")
    assert stat.S_IMODE((tmp_path / "new" / "data").stat().st_mode) == 0o700


def test_an_existing_one_is_left_as_it_is(tmp_path: Path) -> None:
    tmp_path.chmod(0o750)
    make_data_dir(tmp_path)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o750


def test_a_file_in_its_place_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SetupError, match=r"Can't use .*/file as the data directory: it is not a directory\."):
        make_data_dir(tmp_path / "file")
    with pytest.raises(SetupError, match="a part of this path is not a directory"):
        make_data_dir(tmp_path / "file" / "data")


def test_no_permission_is_one_sentence(unwritable: Path) -> None:
    for path in (unwritable, unwritable / "data"):
        with pytest.raises(SetupError, match="permission denied"):
            make_data_dir(path)


def test_a_file_system_that_has_no_directories_is_one_sentence() -> None:
    with pytest.raises(SetupError, match="as the data directory"):
        make_data_dir(Path("/proc/deepseek"))
