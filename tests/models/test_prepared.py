from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from deepseek_api_compat.config import DEFAULT_MODEL
from deepseek_api_compat.errors import ModelError
from deepseek_api_compat.models import catalogue, gguf, prepared, shelf, wheel
from deepseek_api_compat.models.catalogue import Entry, Repository, Wheel
from fakes.hub import FakeHub, sha256
from fakes.screen import Screen

SOURCE = Wheel(
    package="carrier",
    version="1.0",
    wheel_bytes=1000,
    wheel_sha256="",
    member="carrier/tiny-Q4_1.gguf",
    member_bytes=1000,
    sha256="",
    stored="tiny-Q4_0.gguf",
)
TINY = Entry(
    name="tiny", licence="MIT", bytes=1000, source=SOURCE, good_for="x", needs="y", runs_on=("llamacpp",)
)
REPOSITORY = Entry(
    name="big",
    licence="MIT",
    bytes=100,
    source=Repository("org/big"),
    good_for="x",
    needs="GPUs",
    runs_on=("vllm",),
)


def names(place: Path) -> list[str]:
    return sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.is_file())


@pytest.fixture
def fetched(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Lets a copy of the tiny GGUF stand for what pip brings; lists what was asked for."""
    asked: list[Path] = []

    def extract(source: Wheel, target: Path, progress: object) -> None:
        asked.append(target)
        target.write_bytes(tiny_gguf.read_bytes())

    monkeypatch.setattr(wheel, "extract", extract)
    monkeypatch.setattr(catalogue, "CATALOGUE", (*catalogue.CATALOGUE, TINY, REPOSITORY))
    return asked


def test_first_pull_prepares_and_later_ones_only_look(
    fetched: list[Path], cache: Path, screen: Screen
) -> None:
    path = prepared.pull(TINY, screen)
    assert path == cache / "models" / "tiny" / "tiny-Q4_0.gguf"
    assert gguf.inspect(path).file_type == 2
    assert names(path.parent) == ["model.json", "tiny-Q4_0.gguf"]  # the download is gone
    assert prepared.pull(TINY, screen) == path
    assert len(fetched) == 1


def test_two_starts_at_once_prepare_once(
    fetched: list[Path], screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract, second = wheel.extract, threading.Event()

    def slow(*args: object) -> None:
        assert second.wait(10)  # the other start has come to the lock
        extract(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(wheel, "extract", slow)

    class Waiting(Screen):
        def say(self, text: str) -> None:
            super().say(text)
            second.set()

    other = Waiting()
    threads = [threading.Thread(target=prepared.pull, args=(TINY, each)) for each in (other, Waiting())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(fetched) == 1
    assert shelf.ready("tiny")


def test_a_touched_file_is_read_again_and_passes(fetched: list[Path], screen: Screen) -> None:
    path = prepared.pull(TINY, screen)
    os.utime(path, (1, 1))
    assert not shelf.ready("tiny")
    assert prepared.pull(TINY, screen) == path
    assert shelf.ready("tiny")
    assert len(fetched) == 1


@pytest.mark.parametrize("damage", [b"", b"cut", None])
def test_a_damaged_file_is_prepared_again_and_said(
    fetched: list[Path], screen: Screen, damage: bytes | None
) -> None:
    path = prepared.pull(TINY, screen)
    whole = path.read_bytes()
    path.write_bytes(bytes(len(whole)) if damage is None else damage)
    prepared.pull(TINY, screen)
    assert path.read_bytes() == whole
    assert "The files of tiny were changed or damaged; fetching them again." in screen.text


def test_a_damaged_file_is_not_served_when_it_cant_be_fetched_again(
    fetched: list[Path], screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = prepared.pull(TINY, screen)
    path.write_bytes(b"damaged")

    def fail(*args: object) -> None:
        raise ModelError("no network")

    monkeypatch.setattr(wheel, "extract", fail)
    for _ in range(2):
        with pytest.raises(ModelError, match="no network"):
            prepared.pull(TINY, screen)
    with pytest.raises(ModelError, match="not on this machine"):
        prepared.resolve("tiny")


def test_the_download_of_a_killed_run_is_used(
    fetched: list[Path], cache: Path, screen: Screen, tiny_gguf: Path
) -> None:
    source = msgspec.structs.replace(SOURCE, sha256=sha256(tiny_gguf.read_bytes()))
    left = cache / "models" / "tiny" / "tiny-Q4_1.gguf"
    left.parent.mkdir(parents=True)
    left.write_bytes(tiny_gguf.read_bytes())
    path = prepared.pull(msgspec.structs.replace(TINY, source=source), screen)
    assert fetched == []
    assert names(path.parent) == ["model.json", "tiny-Q4_0.gguf"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_pull_that_is_stopped_leaves_nothing(fake_hub: FakeHub, cache: Path, number: int) -> None:
    """With the real command: the hub hangs in the middle of a file, and the person gives up."""
    fake_hub.files["DeepSeek-R1-Distill-Qwen-7B-Q4_K_M.gguf"] = b"x" * 500_000
    fake_hub.hang, fake_hub.cut_after = True, 300_000
    script = "from deepseek_api_compat.models import catalogue, prepared; "
    script += "prepared.pull(catalogue.find('deepseek-r1-distill-qwen-7b'))"
    with subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE) as process:
        assert fake_hub.hanging.wait(10)
        process.send_signal(number)
        process.communicate(timeout=10)
    assert process.returncode == {signal.SIGINT: -signal.SIGINT, signal.SIGTERM: 143}[number]
    assert names(cache) == ["models/.deepseek-r1-distill-qwen-7b.lock"]


def test_a_failed_first_pull_leaves_no_folder(cache: Path, screen: Screen) -> None:
    huge = msgspec.structs.replace(SOURCE, wheel_bytes=10**18)
    with pytest.raises(ModelError, match="Not enough disk space"):
        prepared.pull(msgspec.structs.replace(TINY, source=huge), screen)
    assert names(cache / "models") == [".tiny.lock"]
    assert not (cache / "models" / "tiny").exists()


def test_a_cache_that_cant_be_made_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, screen: Screen
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DEEPSEEK_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelError, match=r"Can't write to the model cache .*DEEPSEEK_CACHE_DIR"):
        prepared.pull(TINY, screen)


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_a_repository_is_pulled_whole_and_continued(
    fake_hub: FakeHub, cache: Path, screen: Screen, source: catalogue.Hub
) -> None:
    content = {"config.json": b"{}", "sub/w 1.safetensors": b"w" * 5000, "sub/w 2.safetensors": b"v" * 5000}
    fake_hub.files.update(content)
    fake_hub.served["sub/w 2.safetensors"] = b"wrong"
    with pytest.raises(ModelError, match=r"w 2\.safetensors"):
        prepared.pull(REPOSITORY, screen, source)
    assert not shelf.ready("big")

    fake_hub.served.clear()
    fake_hub.requests.clear()
    place = prepared.pull(REPOSITORY, screen, source)
    assert {name: (place / name).read_bytes() for name in content} == content
    assert shelf.ready("big")
    assert not [path for path, _ in fake_hub.requests if "w%201" in path]  # it was there already


def test_a_single_file_of_a_repository(
    fake_hub: FakeHub, cache: Path, screen: Screen, tiny_gguf: Path
) -> None:
    data = tiny_gguf.read_bytes()
    fake_hub.files["x.gguf"] = data
    entry = Entry(
        name="one",
        licence="MIT",
        bytes=len(data),
        source=Repository("org/one", file="x.gguf", sha256=sha256(data)),
        good_for="x",
        needs="y",
        runs_on=("llamacpp",),
    )
    assert prepared.pull(entry, screen).read_bytes() == data
    assert len(fake_hub.requests) == 2  # the address and the storage it names, no listing


def test_removing_frees_everything(fetched: list[Path], screen: Screen) -> None:
    path = prepared.pull(TINY, screen)
    (path.parent / "left.part").write_bytes(b"x" * 10)
    size = sum((path.parent / name).stat().st_size for name in names(path.parent))
    assert shelf.remove("tiny", screen) == size
    assert not path.parent.exists()
    assert shelf.remove("tiny", screen) == 0


class TestResolve:
    """What `--model-path` may be."""

    @pytest.fixture
    def place(self, tmp_path: Path, tiny_gguf: Path, fetched: list[Path]) -> Path:
        (tmp_path / "models").mkdir()
        return tmp_path / "models"

    @pytest.fixture
    def put(self, place: Path, tiny_gguf: Path) -> Callable[..., None]:
        def put(*names: str) -> None:
            for name in names:
                (place / name).write_bytes(tiny_gguf.read_bytes())

        return put

    def test_a_file(self, tiny_gguf: Path) -> None:
        assert prepared.resolve(str(tiny_gguf)) == tiny_gguf

    def test_a_directory_with_one_model(self, place: Path, put: Callable[..., None]) -> None:
        put("a.gguf")
        (place / "README.md").write_text("")
        assert prepared.resolve(str(place)) == place / "a.gguf"

    def test_a_split_model(self, place: Path, put: Callable[..., None]) -> None:
        put("a-00001-of-00002.gguf", "a-00002-of-00002.gguf")
        assert prepared.resolve(str(place)) == place / "a-00001-of-00002.gguf"
        assert prepared.resolve(str(place / "a-00002-of-00002.gguf")) == place / "a-00001-of-00002.gguf"

    @pytest.mark.parametrize("there", [("a-00001-of-00003.gguf",), ("a-00002-of-00003.gguf",)])
    def test_a_split_model_with_a_missing_part(
        self, place: Path, put: Callable[..., None], there: tuple[str, ...]
    ) -> None:
        put(*there)
        with pytest.raises(ModelError, match=r"Of the 3 files of a a-0000\d-of-00003.gguf is missing"):
            prepared.resolve(str(place))

    def test_a_name(self, place: Path, screen: Screen) -> None:
        path = prepared.pull(TINY, screen)
        assert prepared.resolve("tiny") == path

    @pytest.mark.parametrize(
        ("name", "sentence"),
        [
            ("tiny", "tiny is not on this machine yet; run: deepseek-api models pull tiny"),
            ("big", "big needs vLLM or SGLang and GPUs"),
            ("deepseek-v3-tokenizer", "is a tokenizer"),
            ("/no/such.gguf", "There is no model file '/no/such.gguf'"),
        ],
    )
    def test_what_is_not_here(self, place: Path, name: str, sentence: str) -> None:
        with pytest.raises(ModelError, match=sentence):
            prepared.resolve(name)

    def test_several_models(self, place: Path, put: Callable[..., None]) -> None:
        put("a.gguf", "b.gguf")
        with pytest.raises(ModelError, match=r"holds several models \(a\.gguf, b\.gguf\)"):
            prepared.resolve(str(place))

    def test_an_empty_directory(self, place: Path) -> None:
        with pytest.raises(ModelError, match=r"holds no \.gguf file"):
            prepared.resolve(str(place))

    def test_safetensors(self, place: Path, put: Callable[..., None]) -> None:
        put("model-00001-of-00163.safetensors")
        for path in (place, place / "model-00001-of-00163.safetensors"):
            with pytest.raises(
                ModelError, match=r"is not GGUF but a format for vLLM or SGLang; serve it with one"
            ):
                prepared.resolve(str(path))

    def test_a_damaged_file(self, place: Path, tiny_gguf: Path) -> None:
        tiny_gguf.write_bytes(tiny_gguf.read_bytes()[:-5])
        with pytest.raises(ModelError, match=r"tiny\.gguf is not a readable GGUF file: it is cut short"):
            prepared.resolve(str(tiny_gguf))


@pytest.mark.embedded
def test_the_real_default_model(users_cache: Path, screen: Screen) -> None:
    path = prepared.default_model(screen)
    assert path.is_relative_to(users_cache)  # fetched at most once by whoever runs the tests
    assert names(path.parent) == ["model.json", path.name]
    header = gguf.inspect(path)
    assert (header.architecture, header.file_type, header.context_length) == ("llama", 2, 8192)
    assert header.chat_template

    started = time.perf_counter()
    assert prepared.default_model(screen) == path
    assert time.perf_counter() - started < 10  # it is not prepared again
    assert prepared.resolve(DEFAULT_MODEL) == path
