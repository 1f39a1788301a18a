import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_api_compat.errors import InvalidRequest
from deepseek_api_compat.gateway.query import Query, moment, number, one_of, text


def test_parameters_are_read_by_their_kind() -> None:
    query = Query(b"model=a%2Fb&limit=7&kind=x&from=2026-11-01", {"model", "limit", "kind", "from", "to"})
    assert query.get("model", text) == "a/b"
    assert query.get("limit", number(1, 10)) == 7
    assert query.get("kind", one_of("x", "y")) == "x"
    assert query.get("from", moment) == 1_793_491_200
    assert query.get("to", moment) is None


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("0", 0.0),
        ("1793491200", 1_793_491_200.0),
        ("2026-11-01", 1_793_491_200.0),
        ("2026-11-01T02:00:00Z", 1_793_498_400.0),
        ("2026-11-01T02:00:00%2B02:00", 1_793_491_200.0),
        ("2026-11-01T02:00:00+02:00", 1_793_491_200.0),
    ],
)
def test_times(written: str, seconds: float) -> None:
    assert Query(f"from={written}".encode(), ["from"]).get("from", moment) == seconds


@pytest.mark.parametrize(
    ("query", "read", "sentence"),
    [
        (b"x=", text, "`x` must be 1 to 200 printable characters."),
        (b"x=%00", text, "`x` must be 1 to 200 printable characters."),
        (b"x=0", number(1, 10), "`x` must be an integer between 1 and 10."),
        (b"x=11", number(1, 10), "`x` must be an integer between 1 and 10."),
        (b"x=1e1", number(1, 10), "`x` must be an integer between 1 and 10."),
        (b"x=%EF%BC%91", number(1, 10), "`x` must be an integer between 1 and 10."),
        (b"x=a", one_of("b", "c", "d"), "`x` must be b, c or d."),
        (b"x=soon", moment, "`x` must be a time: 2026-11-01, 2026-11-01T12:00Z or unix seconds."),
        (b"x=99999999999999", moment, "`x` must be a time: 2026-11-01, 2026-11-01T12:00Z or unix seconds."),
        (b"x=0001-01-01", moment, "`x` must be a time: 2026-11-01, 2026-11-01T12:00Z or unix seconds."),
    ],
)
def test_a_wrong_value_is_named_with_what_it_must_be(query: bytes, read: object, sentence: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Query(query, ["x"]).get("x", read)  # type: ignore[arg-type]
    assert (caught.value.message, caught.value.param) == (sentence, "x")


@pytest.mark.parametrize(
    ("query", "param"),
    [(b"y=1", "y"), (b"x=1&x=2", "x"), (b"x=%ff", None), (b"\xff", None), (b"&".join([b"x"] * 200), None)],
)
def test_an_odd_query_is_refused(query: bytes, param: str | None) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Query(query, ["x"])
    assert caught.value.param == param


@given(st.binary(max_size=60))
def test_nothing_but_a_400_comes_out(query: bytes) -> None:
    try:
        found = Query(query, ["x"])
        for read in (text, moment, number(0, 5), one_of("a", "b")):
            found.get("x", read)  # type: ignore[arg-type]
    except InvalidRequest:
        pass
