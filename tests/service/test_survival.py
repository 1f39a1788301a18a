"""A hundred streams lose their engine at the same moment, and another one has slots for all of them."""

from __future__ import annotations

from pathlib import Path

from bench.fakes import MODEL, Fakes
from bench.service import Service


def test_all_go_on_where_they_were(tmp_path: Path) -> None:
    fakes = Fakes(tmp_path)
    service = Service(tmp_path, fakes.models)
    service.start(MODEL, patience=120.0)
    try:
        streams = fakes.kill_under(service, 100, 80)
    finally:
        service.stop()
    assert [stream.problem for stream in streams if stream.problem] == []
    assert sum(stream.away is not None for stream in streams) == 100
