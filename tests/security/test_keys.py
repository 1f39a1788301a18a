import hashlib
import hmac
import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from deepseek_api_compat.errors import AuthenticationFailed
from deepseek_api_compat.security import keys
from deepseek_api_compat.security.keys import KeyTable, Principal, key_hash, new_key, secret_key
from deepseek_api_compat.store.base import KeyRecord

MASTER = bytes(range(32))


def make(slot: int = 0, **fields: Any) -> tuple[str, KeyRecord]:
    id, key = new_key()
    values = {"name": "alice", "role": "user", "created": 1, **fields}
    return key, KeyRecord(id=id, hash=key_hash(MASTER, key.encode()), slot=slot, **values)


KEY, RECORD = make(3, rps=5.0, role="admin")
TABLE = KeyTable([RECORD, make(1)[1]], MASTER)


def refusal(table: KeyTable, header: bytes | None) -> str:
    with pytest.raises(AuthenticationFailed) as caught:
        table.authenticate(header)
    return caught.value.message


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
    assert principal == Principal(id=RECORD.id, name="alice", role="admin", rps=5.0, index=3)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (None, keys.MISSING),
        (b"", keys.MISSING),
        (KEY.encode(), keys.NOT_BEARER),
        (b"Basic dXNlcjpwYXNz", keys.NOT_BEARER),
        (b"Bearer:" + KEY.encode(), keys.NOT_BEARER),
        (b"Bearer", keys.MALFORMED),
        (b"Bearer ", keys.MALFORMED),
        (b"Bearer sk-proj-123", keys.MALFORMED),
        (b"Bearer " + KEY[:-1].encode(), keys.MALFORMED),
        (b"Bearer " + KEY.encode() + b"x", keys.MALFORMED),
        (b'Bearer "' + KEY.encode() + b'"', keys.MALFORMED),
        (b"Bearer " + KEY.lower().encode(), keys.MALFORMED),
        (b"Bearer " + KEY[:-1].encode() + b"!", keys.UNKNOWN),
        (b"Bearer " + new_key()[1].encode(), keys.UNKNOWN),
        (b"Bearer " + KEY[:17].encode() + new_key()[1][17:].encode(), keys.UNKNOWN),
    ],
)
def test_each_refusal_says_what_to_do(header: bytes | None, message: str) -> None:
    assert refusal(TABLE, header) == message


def test_the_messages_differ() -> None:
    messages = {keys.MISSING, keys.NOT_BEARER, keys.MALFORMED, keys.UNKNOWN, keys.DISABLED}
    assert len(messages) == 5


def test_a_disabled_key_is_named_so_only_to_its_holder() -> None:
    key, record = make(enabled=False)
    table = KeyTable([record], MASTER)
    assert refusal(table, b"Bearer " + key.encode()) == keys.DISABLED
    assert refusal(table, b"Bearer " + key[:-1].encode() + b"!") == keys.UNKNOWN


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
        refusal(TABLE, b"Bearer " + key.encode())
    assert compared == [(32, key_hash(MASTER, key.encode())) for key in wrong]


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
    return st.one_of(st.binary(), near, mutated)


@given(header_like())
@example(b"Bearer " + b"\xff" * 60)
@example(b"Bearer DSK-" + b"\0" * 12 + b"-" + b"\0" * 43)
def test_no_header_raises_anything_but_a_refusal(header: bytes) -> None:
    if header.lower().startswith(b"bearer ") and header[7:].strip(b" ") == KEY.encode():
        assert TABLE.authenticate(header).id == RECORD.id
    else:
        message = refusal(TABLE, header)
        assert message in {keys.MISSING, keys.NOT_BEARER, keys.MALFORMED, keys.UNKNOWN}


def test_a_change_makes_a_new_table_and_leaves_the_old() -> None:
    key, record = make(7)
    header = b"Bearer " + key.encode()
    added = TABLE.with_record(record)
    removed = added.without(record.id)
    assert [table.version for table in (TABLE, added, removed)] == [0, 1, 2]
    assert [len(table) for table in (TABLE, added, removed)] == [2, 3, 2]
    assert added.authenticate(header).index == 7
    assert added.authenticate(b"Bearer " + KEY.encode()).index == 3
    for table in (TABLE, removed):
        assert refusal(table, header) == keys.UNKNOWN


def test_with_record_replaces_the_record_of_the_same_id() -> None:
    key, record = make()
    table = KeyTable([record], MASTER, version=41)
    disabled = KeyRecord(**{**{f: getattr(record, f) for f in record.__struct_fields__}, "enabled": False})
    changed = table.with_record(disabled)
    assert (changed.version, len(changed)) == (42, 1)
    assert refusal(changed, b"Bearer " + key.encode()) == keys.DISABLED


def test_without_an_unknown_id_changes_nothing_else() -> None:
    assert len(TABLE.without("nobody")) == 2
