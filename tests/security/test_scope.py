from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_api_compat.security.scope import is_within, model_name, network, networks


@pytest.mark.parametrize("name", ["deepseek-v3", "org/model:tag@4", "小模型", "m" * 200])
def test_names_that_models_have(name: str) -> None:
    assert model_name(name) == name


@pytest.mark.parametrize("name", ["", "a b", "a,b", "a\n", "a\0", "\udcff", "m" * 201])
def test_names_that_no_model_has(name: str) -> None:
    with pytest.raises(ValueError, match="is no name of a model"):
        model_name(name)


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("10.0.0.0/8", "10.0.0.0/8"),
        ("10.0.0.0/255.0.0.0", "10.0.0.0/8"),
        ("192.0.2.7", "192.0.2.7/32"),
        ("0.0.0.0/0", "0.0.0.0/0"),
        ("2001:DB8:0::/32", "2001:db8::/32"),
        ("::1", "::1/128"),
        ("::/0", "::/0"),
        ("::ffff:192.0.2.7", "192.0.2.7/32"),
        ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
        ("::ffff:0:0/96", "0.0.0.0/0"),
        ("::ffff:0:0/95", None),
        ("::fffe:0:0/95", "::fffe:0:0/95"),
        ("10.0.0.1/8", None),
        ("10.0.0.0/33", None),
        ("10.0.0/8", None),
        ("010.0.0.0/8", None),
        ("fe80::1%eth0", None),
        ("localhost", None),
        ("", None),
        (" ::1", None),
    ],
)
def test_networks_have_one_form(text: str, form: str | None) -> None:
    if form is None:
        with pytest.raises(ValueError, match=r"is no network|names an interface"):
            network(text)
    else:
        assert str(network(text)) == form


def test_bits_behind_the_prefix_get_a_proposal() -> None:
    with pytest.raises(ValueError, match=r"did you mean 2001:db8::/32\?"):
        network("2001:db8::1/32")


addresses = st.integers(0, 255).map(lambda last: f"10.0.0.{last}") | st.integers(0, 255).map(
    lambda last: f"2001:db8::{last:x}"
)


@st.composite
def small_networks(draw: st.DrawFn) -> str:
    address = ip_address(draw(addresses))
    length = address.max_prefixlen - draw(st.integers(0, 8))
    return str(ip_network(f"{address}/{length}", strict=False))


@settings(deadline=None)
@given(small_networks(), st.lists(small_networks(), max_size=3))
def test_within_means_that_one_has_every_address(inner: str, outer: list[str]) -> None:
    def members(text: str) -> set[str]:
        return {str(address) for address in network(text)}

    assert is_within(network(inner), networks(outer)) == any(members(inner) <= members(one) for one in outer)
