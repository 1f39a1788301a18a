from decimal import ROUND_HALF_EVEN, Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_api_compat import config
from deepseek_api_compat.config import PriceSettings
from deepseek_api_compat.errors import ConfigError
from deepseek_api_compat.gateway.prices import FREE, Price, Prices

tokens = st.integers(0, 10**7)
rates = st.decimals(0, 1000, places=6)


@given(tokens, tokens, tokens, rates, rates, rates)
def test_a_price_is_what_decimal_arithmetic_says(
    fresh: int, cached: int, completion: int, a: Decimal, b: Decimal, c: Decimal
) -> None:
    price = Prices([PriceSettings(model="m", prompt=a, cached=b, completion=c)]).find("m")
    exact = fresh * a + cached * b + completion * c  # millionths, as rates are for a million tokens
    expected = int(exact.quantize(Decimal(1), ROUND_HALF_EVEN))
    assert price.of(fresh + cached, cached, completion) == expected


@pytest.mark.parametrize(("tokens", "micro"), [(1, 0), (3, 2), (5, 2), (7, 4)])
def test_halves_are_rounded_to_even(tokens: int, micro: int) -> None:
    assert Price(prompt=500_000).of(tokens, 0, 0) == micro


def test_cached_tokens_cost_what_others_do_unless_said() -> None:
    price = Prices([PriceSettings(model="m", prompt=Decimal("0.27"))]).find("m")
    assert price == Price(270_000, 270_000, 0)


def test_a_model_has_its_own_price_then_that_of_all_then_none() -> None:
    own, every = PriceSettings(model="m", prompt=Decimal(1)), PriceSettings(model="*", prompt=Decimal(2))
    assert Prices([own]).find("other") == FREE
    assert Prices([own, every]).find("other").prompt == 2_000_000
    assert Prices([own, every]).find("m").prompt == 1_000_000


def load(tmp_path, text: str) -> config.Settings:
    file = tmp_path / "config.toml"
    file.write_text(text)
    return config.load(str(file), environ={})


def test_a_price_is_read_exactly_from_the_configuration(tmp_path) -> None:
    settings = load(tmp_path, '[[prices]]\nmodel = "m"\nprompt = 0.27\ncached = "0.1"\ncompletion = 3\n')
    assert Prices(settings.prices).find("m") == Price(270_000, 100_000, 3_000_000)


@pytest.mark.parametrize("amount", ["-1", "1000001", "0.1234567", '"nan"', '"inf"'])
def test_an_amount_that_can_not_be_counted_is_refused(tmp_path, amount: str) -> None:
    with pytest.raises(ConfigError, match=r"prices\.m: completion must be between 0 and 1000000"):
        load(tmp_path, f'[[prices]]\nmodel = "m"\ncompletion = {amount}\n')


def test_two_prices_for_one_model_are_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match="the model 'm' has two prices"):
        load(tmp_path, '[[prices]]\nmodel = "m"\n[[prices]]\nmodel = "m"\n')


@pytest.mark.parametrize("setting", ['currency = "usd"', "max_journal_bytes = 1", "retention_days = -1"])
def test_ledger_settings_out_of_range_are_refused(tmp_path, setting: str) -> None:
    with pytest.raises(ConfigError, match=r"ledger\." + setting.split()[0]):
        load(tmp_path, f"[ledger]\n{setting}\n")
