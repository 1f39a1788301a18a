"""The workers' metrics on a disk without space, and after a worker's death."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.mmap_dict import MmapedDict

from deepseek_api_compat.gateway import metric_files
from deepseek_api_compat.gateway.journal_files import reserve
from deepseek_api_compat.gateway.metric_files import SIZE, MetricFile
from fakes.limited_files import files_limited_to


@pytest.fixture
def made() -> Iterator[list[MetricFile]]:
    made: list[MetricFile] = []
    yield made
    for file in made:
        file.close()


def numbers(path: Path) -> dict[str, float]:
    """What the library finds in the file, when it adds up all workers."""
    return {key: value for key, value, _, _ in MmapedDict.read_all_values_from_file(path)}


def files(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_a_worker_goes_on_with_a_dead_one_s_file(tmp_path: Path, made: list[MetricFile]):
    first, second = MetricFile(str(tmp_path / "counter_1.db")), MetricFile(str(tmp_path / "counter_2.db"))
    made += [first, second, MetricFile(str(tmp_path / "histogram_1.db"))]
    first.write_value("a", 5.0, 0.0)
    second.write_value("a", 3.0, 0.0)
    first.close()  # as its death would
    made.append(MetricFile(str(tmp_path / "counter_4.db")))
    successor = made[-1]
    assert successor.read_value("a") == (5.0, 0.0)
    successor.write_value("a", 6.0, 0.0)
    successor.write_value("b", 1.0, 0.0)
    assert files(tmp_path) == {"counter_1.db", "counter_2.db", "histogram_1.db"}
    assert numbers(tmp_path / "counter_1.db") == {"a": 6.0, "b": 1.0}
    assert numbers(tmp_path / "counter_2.db") == {"a": 3.0}


def test_a_file_has_all_its_space_from_the_start_and_when_it_grows(tmp_path: Path, made: list[MetricFile]):
    path = tmp_path / "counter_1.db"
    made.append(MetricFile(str(path)))
    assert path.stat().st_blocks * 512 >= SIZE
    names = {f"{number}" * 500: float(number) for number in range(100, 150)}
    for name, value in names.items():
        made[0].write_value(name, value, 0.0)
    assert path.stat().st_blocks * 512 >= path.stat().st_size >= 2 * SIZE
    assert numbers(path) == names


def test_a_file_can_be_read_as_soon_as_it_is_there(
    tmp_path: Path, made: list[MetricFile], monkeypatch: pytest.MonkeyPatch
):
    """`/metrics` of one worker reads while another one starts."""
    seen: list[dict[str, float]] = []

    def reserving(*args: int) -> None:
        seen.extend(numbers(path) for path in tmp_path.glob("*.db"))
        reserve(*args)
        seen.append({})

    monkeypatch.setattr(metric_files, "reserve", reserving)
    made.append(MetricFile(str(tmp_path / "counter_1.db")))
    made.append(MetricFile(str(tmp_path / "counter_2.db")))
    assert seen == [{}] * 3
    assert files(tmp_path) == {"counter_1.db", "counter_2.db"}


def test_without_space_for_a_file_a_worker_counts_for_nobody(tmp_path: Path, made: list[MetricFile]):
    with files_limited_to(0):
        made.append(MetricFile(str(tmp_path / "counter_1.db")))
    made[0].write_value("a", 5.0, 0.0)
    assert made[0].read_value("a") == (5.0, 0.0)
    assert files(tmp_path) == set()


def test_without_space_to_grow_what_fits_still_counts(tmp_path: Path, made: list[MetricFile]):
    path = tmp_path / "counter_1.db"
    made.append(MetricFile(str(path)))
    made[0].write_value("a", 5.0, 0.0)
    with files_limited_to(SIZE):
        for number in range(100, 150):
            made[0].write_value(f"{number}" * 500, 1.0, 0.0)
    assert made[0].read_value("149" * 500) == (1.0, 0.0)
    found = numbers(path)
    assert found["a"] == 5.0
    assert 40 <= len(found) < 51
    assert path.stat().st_size == SIZE
