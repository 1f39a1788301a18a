from __future__ import annotations

import re
from typing import get_args, get_type_hints

import pytest

from deepseek_api_compat.config import DEFAULT_MODEL, ModelSettings
from deepseek_api_compat.models import catalogue
from deepseek_api_compat.models.catalogue import CATALOGUE, Entry, Repository, Wheel
from deepseek_api_compat.protocol.deepseek.detect import REQUIRED

HASH = re.compile(r"[0-9a-f]{64}")


def test_the_default_model_is_there_and_servable() -> None:
    entry = catalogue.find(DEFAULT_MODEL)
    assert entry.embedded
    assert isinstance(entry.source, Wheel)


def test_names_are_unique_and_usable_as_folders() -> None:
    names = [entry.name for entry in CATALOGUE]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name) for name in names)


@pytest.mark.parametrize("entry", CATALOGUE, ids=lambda entry: entry.name)
def test_whatever_is_one_file_has_its_hash(entry: Entry) -> None:
    source = entry.source
    if isinstance(source, Wheel):
        assert HASH.fullmatch(source.wheel_sha256)
        assert HASH.fullmatch(source.sha256)
    elif source.file:
        assert source.sha256
        assert HASH.fullmatch(source.sha256)
    # Only a GGUF file runs in the embedded engine, and whole repositories hold other formats.
    assert entry.embedded == (
        (source.stored if isinstance(source, Wheel) else source.file or "").endswith("gguf")
    )


def test_the_deepseek_family_comes_from_deepseek() -> None:
    family = [entry for entry in CATALOGUE if entry.runs_on == ("vllm", "sglang")]
    assert {"deepseek-v3", "deepseek-r1", "deepseek-v3.1", "deepseek-v3.2", "deepseek-v4-pro"} <= {
        entry.name for entry in family
    }
    for entry in family:
        assert isinstance(entry.source, Repository)
        assert entry.source.repo.lower() == f"deepseek-ai/{entry.name}"


def test_every_model_has_a_format_that_can_be_configured() -> None:
    known = get_args(get_type_hints(ModelSettings)["format"])
    assert set(known) == {"auto", "template", *REQUIRED}
    for entry in CATALOGUE:
        assert (entry.format is not None) == bool(entry.runs_on), entry.name
        assert entry.format is None or entry.format in known
