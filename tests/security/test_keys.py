import hashlib
import hmac
import re
import time
from collections.abc import Callable
from ipaddress import ip_network
from statistics import median
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from deepseek_api_compat.errors import AuthenticationFailed
from deepseek_api_compat.security import keys
from deepseek_api_compat.security.keys import KeyTable, Principal, key_hash, new_key, secret_key
from deepseek_api_compat.store.base import KeyLimits, KeyRecord

MASTER = bytes(range(32))


def make(slot: int = 0, **fields: Any) -> tuple[str, KeyRecord]:
    id, key = new_key()
    values = {"name": "alice", "role": "user", "created": 1, **fields}
    return key, KeyRecord(id=id, hash=key_hash(MASTER, key.encode()), slot=slot, **values)


KEY, RECORD = make(3, limits=KeyLimits(rps=5.0), role="admin")
TABLE = KeyTable([RECORD, make(1)[1]], MASTER)


def refused(table: KeyTable, header: bytes | None, now: float | None = None) -> AuthenticationFailed:
    with pytest.raises(AuthenticationFailed) as caught:
        table.authenticate(header, now)
    return caught.value


def refusal(table: KeyTable, header: bytes | None) -> str:
    return refused(table, header).message


def bearer(key: str) -> bytes:
    return b"Bearer " + key.encode()


def test_a_key_has_the_documented_form() -> None:
    id, key = new_key()
    assert re.fullmatch(rf"DSK-{id}-[A-Za-z0-9]{{43}}", key)
    assert re.fullmatch(r"[a-z2-7]{12}", id)
    assert len({new_key() for _ in range(100)}) == 100


def test_derived_values_are_plain_hmacs_kept_apart_by_a_prefix() -> None:
    assert key_hash(MASTER, b"k") == hmac.new(MASTER, b"key:k", hashlib.sha256).digest()
    assert secret_key(MASTER, "id", 2) == hmac.new(MASTER, b"secret:id:2", hashlib.sha256).hexdigest()


def test_a_new_version_has_a_new_secret() -> None:
    secrets = {secret_key(MASTER, id, version) for id in ("a", "b") for version in (1, 2)}
    assert len(secrets) == 4


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "bEaReR"])
@pytest.mark.parametrize("form", ["{} {}", "{}  {}", "{} {} "])
def test_a_good_key_gives_its_principal(scheme: str, form: str) -> None:
    principal = TABLE.authenticate(form.format(scheme, KEY).encode())
    limits = KeyLimits(rps=5.0)
    assert principal == Principal(id=RECORD.id, name="alice", role="admin", limits=limits, index=3)


def test_a_principal_has_all_that_the_record_says() -> None:
    key, record = make(
        9,
        owner="ops",
        expires=2000,
        models=("a", "b"),
        networks=("10.0.0.0/8", "::ffff:192.0.2.0/120"),
        limits=KeyLimits(tpd=7),
        budget=5_000_000,
    )
    assert KeyTable([record], MASTER).authenticate(bearer(key), 1999) == Principal(
        id=record.id,
        name="alice",
        owner="ops",
        role="user",
        index=9,
        expires=2000,
        models=frozenset("ab"),
        networks=(ip_network("10.0.0.0/8"), ip_network("192.0.2.0/24")),
        limits=KeyLimits(tpd=7),
        budget=5_000_000,
    )


def test_a_list_that_lists_nothing_allows_nothing() -> None:
    key, record = make(models=(), networks=())
    principal = KeyTable([record], MASTER).authenticate(bearer(key))
    assert (principal.models, principal.networks) == (frozenset(), ())


def test_networks_that_no_one_can_read_allow_nobody() -> None:
    key, record = make(networks=("10.0.0.0/8", "everywhere"))
    assert KeyTable([record], MASTER).authenticate(bearer(key)).networks == ()


def test_a_key_may_come_without_its_scheme() -> None:
    assert TABLE.authenticate_key(KEY.encode()) is TABLE.authenticate(bearer(KEY))
    with pytest.raises(AuthenticationFailed) as caught:
        TABLE.authenticate_key(bearer(KEY))
    assert caught.value.message == keys.MALFORMED


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (None, keys.MISSING),
        (b"", keys.MISSING),
        (KEY.encode(), keys.NOT_BEARER),
        (b"Basic dXNlcjpwYXNz", keys.NOT_BEARER),
        (b"Bearer:" + KEY.encode(), keys.NOT_BEARER),
        (b"Bearer", keys.MISSING),
        (b"Bearer ", keys.MISSING),
        (b"Bearer sk-proj-123", keys.MALFORMED),
        (b"Bearer " + KEY[:-1].encode(), keys.MALFORMED),
        (b"Bearer " + KEY.encode() + b"x", keys.MALFORMED),
        (b'Bearer "' + KEY.encode() + b'"', keys.MALFORMED),
        (b"Bearer " + KEY.lower().encode(), keys.MALFORMED),
        (b"Bearer " + KEY[:-1].encode() + b"!", keys.UNKNOWN),
        (b"Bearer " + new_key()[1].encode(), keys.UNKNOWN),
        (b"Bearer " + KEY[:17].encode() + new_key()[1][17:].encode(), keys.UNKNOWN),
    ],
    ids=lambda value: "",  # keys are made anew by each process, and names have to be the same in all
)
def test_each_refusal_says_what_to_do(header: bytes | None, message: str) -> None:
    assert refusal(TABLE, header) == message


def test_the_messages_differ() -> None:
    messages = [value for name, value in vars(keys).items() if name.isupper() and name[0] != "_"]
    sentences = [value for value in messages if isinstance(value, str) and value.endswith((".", "?"))]
    assert len(sentences) == len(set(sentences)) == 9


def test_a_disabled_key_is_named_so_only_to_its_holder() -> None:
    key, record = make(enabled=False, expires=1)
    table = KeyTable([record], MASTER)
    error = refused(table, bearer(key))
    assert (error.message, error.code, error.status) == (keys.DISABLED, "key_disabled", 401)
    error = refused(table, bearer(key)[:-1] + b"!")
    assert (error.message, error.code) == (keys.UNKNOWN, "invalid_api_key")


def test_a_key_expires_to_the_second() -> None:
    key, record = make(expires=1000)
    table = KeyTable([record], MASTER)
    assert table.authenticate(bearer(key), 999.9).id == record.id
    for now in (1000.0, 5000.0, None):
        error = refused(table, bearer(key), now)
        assert (error.message, error.code) == (keys.EXPIRED, "key_expired")
    assert refusal(table, bearer(key)[:-1] + b"!") == keys.UNKNOWN


def rotated(**fields: Any) -> tuple[str, str, KeyTable]:
    """The old key, the new one, and the table; they overlap until second 1000."""
    old, before = make(version=4, **fields)
    new = old[:17] + new_key()[1][17:]
    changes = {
        "hash": key_hash(MASTER, new.encode()),
        "version": 5,
        "old_hash": before.hash,
        "old_version": 4,
    }
    return old, new, KeyTable([msgspec.structs.replace(before, old_until=1000, **changes)], MASTER)


def test_a_rotated_key_is_good_while_it_overlaps() -> None:
    old, new, table = rotated()
    assert table.authenticate(bearer(old), 999.9) == table.authenticate(bearer(new), 999.9)
    assert table.authenticate(bearer(new), 1000).name == "alice"
    error = refused(table, bearer(old), 1000)
    assert (error.message, error.code) == (keys.ROTATED, "key_expired")
    assert refusal(table, bearer(new)[:-1] + b"!") == keys.UNKNOWN


@pytest.mark.parametrize(
    ("fields", "code"), [({"enabled": False}, "key_disabled"), ({"expires": 500}, "key_expired")]
)
def test_a_rotated_key_is_no_better_than_the_new_one(fields: dict[str, Any], code: str) -> None:
    old, new, table = rotated(**fields)
    assert {refused(table, bearer(key), 600).code for key in (old, new)} == {code}


def test_another_master_key_knows_no_key() -> None:
    assert refusal(KeyTable([RECORD], bytes(32)), b"Bearer " + KEY.encode()) == keys.UNKNOWN


def test_an_unknown_id_costs_the_same_work_as_a_wrong_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[int, bytes]] = []
    real_compare = hmac.compare_digest

    def compare_digest(a: bytes, b: bytes) -> bool:
        compared.append((len(a), b))
        return real_compare(a, b)

    monkeypatch.setattr(hmac, "compare_digest", compare_digest)
    wrong = [new_key()[1], KEY[:17] + new_key()[1][17:]]
    for key in wrong:
        refusal(TABLE, bearer(key))
    assert compared == [(32, key_hash(MASTER, key.encode())) for key in wrong for _ in range(2)]


def test_no_kind_of_wrong_key_is_told_by_the_time_it_takes() -> None:
    """Medians of many interleaved trials; what differs by less than 10 % can't be seen over a network."""
    wrong = {
        "wrong id": bearer(new_key()[1]),
        "wrong secret": bearer(KEY[:17] + new_key()[1][17:]),
        "wrong last character": bearer(KEY[:-1] + ("a" if KEY[-1] != "a" else "b")),
    }

    def differ() -> bool:
        times: dict[str, list[int]] = {kind: [] for kind in wrong}
        for _ in range(3000):
            for kind, header in wrong.items():
                times[kind].append(time_of(lambda header=header: refused_quickly(TABLE, header)))
        medians = [median(taken) for taken in times.values()]
        return max(medians) > 1.1 * min(medians)

    assert not all(differ() for _ in range(3)), "three measurements of three"


def refused_quickly(table: KeyTable, header: bytes) -> None:
    try:
        table.authenticate(header)
    except AuthenticationFailed:
        return
    raise AssertionError("a wrong key was accepted")


def time_of(work: Callable[[], None]) -> int:
    begin = time.perf_counter_ns()
    work()
    return time.perf_counter_ns() - begin


def header_like() -> st.SearchStrategy[bytes]:
    """Anything, and things close to a real header."""
    near = st.tuples(
        st.sampled_from([b"Bearer ", b"bearer", b"Bearer DSK-", b"Bearer " + KEY.encode()[:17], b"\t"]),
        st.binary(max_size=80),
    ).map(b"".join)
    real = b"Bearer " + KEY.encode()
    mutated = st.tuples(st.integers(0, len(real) - 1), st.binary(max_size=2)).map(
        lambda change: real[: change[0]] + change[1] + real[change[0] + 1 :]
    )
    dotted = st.lists(st.binary(max_size=20), min_size=2, max_size=4).map(b".".join)
    return st.one_of(st.binary(), near, mutated, dotted.map(lambda value: b"Bearer " + value))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no fault
@given(header_like())
@example(b"Bearer " + b"\xff" * 60)
@example(b"Bearer DSK-" + b"\0" * 12 + b"-" + b"\0" * 43)
def test_no_header_raises_anything_but_a_refusal(header: bytes) -> None:
    if header.lower().startswith(b"bearer ") and header[7:].strip(b" ") == KEY.encode():
        assert TABLE.authenticate(header).id == RECORD.id
    else:
        message = refusal(TABLE, header)
        known = {keys.MISSING, keys.NOT_BEARER, keys.MALFORMED, keys.UNKNOWN}
        assert message in known or message.startswith("The token is malformed: ")


def test_a_table_knows_its_version_and_size() -> None:
    assert (TABLE.version, len(TABLE)) == (0, 2)
    assert KeyTable([], MASTER, version=7).version == 7
