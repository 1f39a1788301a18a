"""Engines are taken out of service and put back under load: no request fails, no text changes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest

from deepseek_api_compat import control
from deepseek_api_compat.errors import SetupError
from fakes.configs import ENGINE, PATIENT, counting
from fakes.observe import engine_lives
from fakes.service import Service
from fakes.tiny_gguf import write_gguf
from fakes.wire import Wire, call, request, text_of

PATH = "/v1/chat/completions"
TOKENS = 100


@pytest.fixture(scope="module")
def pair(start) -> Service:
    return start(PATIENT + ENGINE + "replicas = 2\n", "--workers", "2")


@pytest.fixture(scope="module")
def undisturbed(pair: Service) -> str:
    answer = call(pair.port, request("POST", PATH, counting("tiny", max_tokens=TOKENS), pair.key))
    return str(answer.json()["choices"][0]["message"]["content"])


def streams(service: Service, count: int) -> dict[Wire, bytes]:
    """So many answers that have all begun, with their first chunks."""
    body = counting("tiny", stream=True, max_tokens=TOKENS)
    wires = [Wire(service.port).send(request("POST", PATH, body, service.key)) for _ in range(count)]
    return {wire: (wire.head(), wire.chunk())[1] for wire in wires}


def check_whole(begun: dict[Wire, bytes], undisturbed: str) -> None:
    for wire, first in begun.items():
        assert text_of(first + b"".join(iter(wire.chunk, b""))) == undisturbed


def model_file(service: Service) -> Path:
    [file] = {
        Path(os.fsdecode(word.removeprefix(b"--model=")))
        for engine in service.engines()
        for word in Path(f"/proc/{engine['pid']}/cmdline").read_bytes().split(b"\0")
        if word.startswith(b"--model=")
    }
    return file


def states(service: Service) -> list[str]:
    return [engine["state"] for engine in service.engines()]


def test_a_drained_replica_gets_no_work_and_its_answers_go_on_elsewhere(pair: Service, undisturbed: str):
    begun = streams(pair, 3)
    body = {"model": "tiny", "replica": 0}
    [shown] = call(pair.port, request("POST", "/admin/v1/engines/drain", body, pair.key)).json()["data"]
    assert (shown["replica"], shown["state"]) == (0, "drained")
    check_whole(begun, undisturbed)
    assert states(pair) == ["drained", "ready"]
    pid = pair.engines()[0]["pid"]
    pair.command("engines", "restart", "tiny", "0")
    assert states(pair) == ["ready", "ready"]
    assert pair.engines()[0]["pid"] != pid


def test_another_file_of_the_model_takes_over_under_load(
    pair: Service, undisturbed: str, tmp_path_factory: pytest.TempPathFactory
):
    upgraded = tmp_path_factory.mktemp("model") / "upgraded.gguf"
    shutil.copy(model_file(pair), upgraded)
    pids = [engine["pid"] for engine in pair.engines()]
    begun = streams(pair, 4)
    control.call(pair.data_dir, "engines.restart", timeout=300, model="tiny", path=str(upgraded))
    check_whole(begun, undisturbed)
    assert states(pair) == ["ready", "ready"]
    for engine, pid in zip(pair.engines(), pids, strict=True):
        assert engine["pid"] != pid
        assert str(upgraded).encode() in Path(f"/proc/{engine['pid']}/cmdline").read_bytes()


def test_what_can_t_be_served_changes_nothing(pair: Service, tmp_path: Path):
    other_tokens = write_gguf(
        tmp_path / "other.gguf", np.zeros((8, 32), np.float32), gguf.GGMLQuantizationType.Q8_0
    )
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(model_file(pair).read_bytes()[:-1000])
    before = engine_lives(pair)
    for path, why in (
        (other_tokens, "tokens"),
        (broken, "cut short"),
        (tmp_path / "none.gguf", "No such file"),
    ):
        with pytest.raises(SetupError, match=why):
            control.call(pair.data_dir, "engines.restart", model="tiny", path=str(path))
    assert engine_lives(pair) == before


def test_wrong_names(pair: Service):
    wrong = ({"model": "tiny", "replica": 7}, 404), ({"model": "x"}, 404), ({"replica": 0}, 400)
    for body, status in wrong:
        answer = call(pair.port, request("POST", "/admin/v1/engines/drain", body, pair.key))
        assert answer.status == status
        assert answer.error["message"]
