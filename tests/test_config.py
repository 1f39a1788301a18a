"""Rules of the configuration that no other test meets on its way."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepseek_api_compat import config
from deepseek_api_compat.errors import ConfigError

ENGINE = '\n[[models.engines]]\nkind = "openai"\nbase_url = "http://127.0.0.1:1/v1"\n'


def load(tmp_path: Path, text: str) -> config.Settings:
    file = tmp_path / "config.toml"
    file.write_text(text, encoding="utf-8")
    return config.load(str(file), environ={})


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('caption_url = "http://a/v1"', "caption_url and caption_model go together"),
        ('transcription_model = "m"', "transcription_url and transcription_model go together"),
        ('caption_url = "ftp://a"\ncaption_model = "m"', "must begin with http"),
        ('caption_api_key_env = "KEY"', "needs caption_url"),
        ('fetch_networks = ["10.0.0.1/8"]', "'10.0.0.1/8' is no network"),
        ("max_files = 0", "max_files must be between"),
        ("max_bytes = 10", "max_bytes must be between"),
        ("max_pixels = 0", "max_pixels must be between"),
        ("timeout = 0", "timeout must be above 0"),
        ("fetch_timeout = 0.0", "fetch_timeout must be above 0"),
        ("cache_bytes = -1", "cache_bytes can't be negative"),
    ],
)
def test_media_settings_that_make_no_sense(tmp_path: Path, line: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        load(tmp_path, f"[media]\n{line}\n")


def test_only_upstreams_see_and_hear(tmp_path: Path) -> None:
    for sense in ("vision", "hearing"):
        text = f'[[models]]\nname = "a"{ENGINE}{sense} = true\n'
        assert getattr(load(tmp_path, text).models[0].engines[0], sense)
        with pytest.raises(ConfigError, match="of kind vllm gets token ids"):
            load(tmp_path, text.replace('"openai"', '"vllm"').replace("base_url", 'path = "x"\nbase_url'))


def test_v3_is_asked_about_pictures_by_a_name_of_its_own(tmp_path: Path) -> None:
    """Unless another model has it."""
    text = f'[[models]]\nname = "v3"\naliases = ["deepseek-v3"]{ENGINE}[[models]]\nname = "eyes"{ENGINE}'
    settings = config.with_multimodal(load(tmp_path, text))
    assert [model.aliases for model in settings.models] == [["deepseek-v3", "deepseek-v3-multimodal"], []]
    text = text.replace('"eyes"', '"deepseek-v3-multimodal"')
    settings = config.with_multimodal(load(tmp_path, text))
    assert [model.aliases for model in settings.models] == [["deepseek-v3"], []]
