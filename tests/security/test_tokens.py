"""Temporary tokens: made by us, by any other JWT library, or by somebody who means harm."""

import base64
import hmac
import json
import re
import string
from collections.abc import Callable
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import jwt
import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from deepseek_api_compat.errors import AuthenticationFailed
from deepseek_api_compat.security import keys, tokens
from deepseek_api_compat.security.keys import KeyTable, Principal, key_hash, new_key, secret_key
from deepseek_api_compat.store.base import KeyLimits, KeyRecord

MASTER = bytes(range(32))
NOW = 1_800_000_000


def make(**fields: Any) -> KeyRecord:
    id, key = new_key()
    values = {"name": "alice", "role": "user", "created": 1, "hash": key_hash(MASTER, key.encode()), **fields}
    return KeyRecord(id=id, **values)


RECORD = make(slot=3, owner="ops", limits=KeyLimits(rpm=9), budget=7)
SECRET = secret_key(MASTER, RECORD.id, 1)
TABLE = KeyTable([RECORD, make(slot=1)], MASTER)


def bearer(token: str) -> bytes:
    return b"Bearer " + token.encode()


def refused(table: KeyTable, token: str, now: float = NOW) -> AuthenticationFailed:
    with pytest.raises(AuthenticationFailed) as caught:
        table.authenticate(bearer(token), now)
    return caught.value


def claims(**changes: Any) -> dict[str, Any]:
    """Good ones; None takes a claim away."""
    plain = {"sub": RECORD.id, "iat": NOW, "nbf": NOW, "exp": NOW + 3600, "jti": "one", **changes}
    return {name: value for name, value in plain.items() if value is not None}


def b64(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def signed(header: bytes, payload: bytes, secret: str = SECRET, digest: str = "sha256") -> str:
    """A token of any bytes, rightly signed."""
    signing = b64(header) + b"." + b64(payload)
    return (signing + b"." + b64(hmac.digest(secret.encode(), signing, digest))).decode()


HEADER = b'{"alg":"HS256","typ":"JWT"}'


def token(**changes: Any) -> str:
    return signed(HEADER, json.dumps(claims(**changes)).encode())


def broken(token: str) -> str:
    """The same with another signature: its first character changed, all of whose bits count."""
    head, payload, signature = token.split(".")
    return f"{head}.{payload}.{'B' if signature[0] == 'A' else 'A'}{signature[1:]}"


# Good ones


def test_a_token_of_ours_is_the_keys_principal_narrowed() -> None:
    made = tokens.issue(
        RECORD.id, SECRET, expires_in=60, models=["a"], networks=["10.0.0.0/8"], max_tokens=5, now=NOW
    )
    principal = TABLE.authenticate(bearer(made), NOW)
    assert principal == Principal(
        id=RECORD.id,
        name="alice",
        owner="ops",
        role="user",
        index=3,
        expires=NOW + 60,
        models=frozenset("a"),
        networks=(ip_network("10.0.0.0/8"),),
        limits=KeyLimits(rpm=9),
        budget=7,
        max_tokens=5,
        token_id=principal.token_id,
    )
    assert principal.token_id


def test_two_tokens_have_two_ids() -> None:
    made = [tokens.issue(RECORD.id, SECRET, expires_in=60, now=NOW) for _ in range(2)]
    assert len({TABLE.authenticate(bearer(one), NOW).token_id for one in made}) == 2


def test_what_we_make_is_what_other_libraries_read() -> None:
    made = tokens.issue(RECORD.id, SECRET, expires_in=60.9, now=NOW + 0.9)
    found = jwt.decode(
        made,
        SECRET,
        algorithms=["HS256"],
        options=dict.fromkeys(("verify_exp", "verify_nbf", "verify_iat"), False),
    )
    assert found == {"sub": RECORD.id, "iat": NOW, "nbf": NOW, "exp": NOW + 60, "jti": found["jti"]}


@pytest.mark.parametrize("extra", [{}, {"kid": "x", "cty": "y"}])
def test_what_other_libraries_make_is_read(extra: dict[str, str]) -> None:
    made = jwt.encode(claims(exp=NOW + 60.5), SECRET, algorithm="HS256", headers=extra)
    assert TABLE.authenticate(bearer(made), NOW).expires == NOW + 60.5


def test_a_token_may_come_without_its_scheme() -> None:
    assert TABLE.authenticate_key(token().encode(), NOW).token_id == "one"


def test_a_token_ends_with_its_key_at_the_latest() -> None:
    record = make(expires=NOW + 50)
    made = tokens.issue(record.id, secret_key(MASTER, record.id, 1), expires_in=3600, now=NOW)
    table = KeyTable([record], MASTER)
    assert table.authenticate(bearer(made), NOW).expires == NOW + 50
    assert table.authenticate(bearer(made), NOW + 49.9).expires == NOW + 50
    assert refused(table, made, NOW + 50).code == "key_expired"


# Times


@pytest.mark.parametrize(
    ("at", "code"),
    [
        (-61, "token_not_yet_valid"),
        (-60, None),
        (0, None),
        (3659.9, None),
        (3660, "token_expired"),
        (10**6, "token_expired"),
    ],
)
@pytest.mark.parametrize("warm", [False, True])
def test_clocks_may_differ_by_a_minute(at: float, code: str | None, warm: bool) -> None:
    table = KeyTable([RECORD], MASTER)
    if warm and at > 0:
        table.authenticate(bearer(token()), NOW)
    if code is None:
        assert table.authenticate(bearer(token()), NOW + at).token_id == "one"
    else:
        assert refused(table, token(), NOW + at).code == code


def test_a_token_may_begin_later_than_it_was_made() -> None:
    assert refused(TABLE, token(nbf=NOW + 600), NOW + 539).code == "token_not_yet_valid"
    assert TABLE.authenticate(bearer(token(nbf=NOW + 600)), NOW + 540).id == RECORD.id


def test_a_token_lives_a_day_at_most() -> None:
    assert TABLE.authenticate(bearer(token(exp=NOW + 86_400)), NOW)
    assert refused(TABLE, token(exp=NOW + 86_401)).code == "scope_too_wide"


def test_a_token_from_the_future_does_not_stretch_its_life() -> None:
    assert refused(TABLE, token(iat=NOW + 10**6, exp=NOW + 10**6 + 60)).code == "token_not_yet_valid"


# Signatures and keys


def test_a_wrong_signature() -> None:
    other = secret_key(MASTER, RECORD.id, 2)
    for made in (signed(HEADER, json.dumps(claims()).encode(), other), broken(token()), token() + "AAAA"):
        assert refused(TABLE, made).code == "bad_signature"


def test_changed_claims_break_the_signature() -> None:
    head, _, signature = token().split(".")
    changed = b64(json.dumps(claims(exp=NOW + 7200)).encode()).decode()
    assert refused(TABLE, f"{head}.{changed}.{signature}").code == "bad_signature"


def test_the_api_key_itself_signs_nothing() -> None:
    for secret in ("", RECORD.id, RECORD.hash.hex(), MASTER.hex(), bytes.fromhex(SECRET).decode("latin-1")):
        assert refused(TABLE, signed(HEADER, json.dumps(claims()).encode(), secret)).code == "bad_signature"


def test_an_expired_token_with_a_wrong_signature_says_only_that() -> None:
    assert refused(TABLE, broken(token(exp=NOW - 7200))).code == "bad_signature"


@pytest.mark.parametrize("alg", ["none", "None", "HS512", "HS384", "RS256", "ES256", "hs256", ""])
def test_another_algorithm(alg: str) -> None:
    digest = {"HS512": "sha512", "HS384": "sha384"}.get(alg, "sha256")
    header = json.dumps({"alg": alg}).encode()
    payload = json.dumps(claims()).encode()
    assert refused(TABLE, signed(header, payload, digest=digest)).code == "bad_algorithm"
    unsigned = f"{b64(header).decode()}.{b64(payload).decode()}."
    assert refused(TABLE, unsigned).code in {"bad_algorithm", "invalid_api_key"}


def test_an_unknown_key() -> None:
    error = refused(TABLE, token(sub="aaaaaaaaaaaa"))
    assert (error.message, error.code) == (keys.TOKEN_OF_UNKNOWN, "invalid_api_key")


@pytest.mark.parametrize(
    ("fields", "code"), [({"enabled": False}, "key_disabled"), ({"expires": NOW}, "key_expired")]
)
def test_a_key_that_may_not_be_used(fields: dict[str, Any], code: str) -> None:
    record = make(**fields)
    made = tokens.issue(record.id, secret_key(MASTER, record.id, 1), expires_in=60, now=NOW)
    assert refused(KeyTable([record], MASTER), made).code == code
    assert refused(KeyTable([record], MASTER), broken(made)).code == "bad_signature"


def test_rotation_ends_tokens_when_the_overlap_ends() -> None:
    rotated = msgspec.structs.replace(
        RECORD, hash=b"new" * 10, version=2, old_hash=RECORD.hash, old_version=1, old_until=NOW + 100
    )
    table = KeyTable([rotated], MASTER)
    old = token()
    new = signed(HEADER, json.dumps(claims()).encode(), secret_key(MASTER, RECORD.id, 2))
    for now in (NOW, NOW + 99.9):
        assert [table.authenticate(bearer(one), now).token_id for one in (old, new)] == ["one", "one"]
    assert refused(table, old, NOW + 100).code == "bad_signature"
    assert table.authenticate(bearer(new), NOW + 100).token_id == "one"


def test_a_change_of_the_key_reaches_tokens_that_were_verified() -> None:
    KeyTable([RECORD], MASTER).authenticate(bearer(token()), NOW)
    assert refused(KeyTable([NARROW], MASTER), token()).message == keys.TOKEN_OF_UNKNOWN
    disabled = KeyTable([msgspec.structs.replace(RECORD, enabled=False)], MASTER)
    assert refused(disabled, token()).code == "key_disabled"


# Scopes

NARROW = make(models=("a", "b"), networks=("10.0.0.0/8", "2001:db8::/32"))


@pytest.mark.parametrize(
    ("scope", "wider"),
    [
        ({"models": ["a"]}, None),
        ({"models": ["b", "a", "a"]}, None),
        ({"models": ["a", "c"]}, "the model 'c'"),
        ({"models": ["A"]}, "the model 'A'"),
        ({"networks": ["10.1.0.0/16"]}, None),
        ({"networks": ["10.1.2.3", "2001:db8:1::/48"]}, None),
        ({"networks": ["::ffff:10.1.0.0/112"]}, None),
        ({"networks": ["10.0.0.0/7"]}, "the network '10.0.0.0/7'"),
        ({"networks": ["10.1.0.0/16", "192.0.2.1"]}, "the network '192.0.2.1/32'"),
        ({"networks": ["::/0"]}, "the network '::/0'"),
        ({"networks": ["0.0.0.0/0"]}, "the network '0.0.0.0/0'"),
    ],
)
def test_a_scope_may_not_be_wider_than_the_keys(scope: dict[str, list[str]], wider: str | None) -> None:
    table = KeyTable([NARROW], MASTER)
    made = tokens.issue(NARROW.id, secret_key(MASTER, NARROW.id, 1), expires_in=60, now=NOW, **scope)
    if wider is None:
        principal = table.authenticate(bearer(made), NOW)
        assert principal.models == frozenset(scope.get("models", "ab"))
        assert principal.networks is not None
        assert len(principal.networks) == len(scope.get("networks", "12"))
    else:
        error = refused(table, made)
        assert error.code == "scope_too_wide"
        assert wider in error.message


def test_a_token_without_a_scope_has_the_keys() -> None:
    table = KeyTable([NARROW], MASTER)
    made = tokens.issue(NARROW.id, secret_key(MASTER, NARROW.id, 1), expires_in=60, now=NOW)
    principal = table.authenticate(bearer(made), NOW)
    assert principal.models == frozenset("ab")
    assert principal.networks == (ip_network("10.0.0.0/8"), ip_network("2001:db8::/32"))
    assert principal.max_tokens is None


# Malformed ones

NESTED = b"[" * 1500


@pytest.mark.parametrize(
    ("header", "payload"),
    [
        (b"", b""),
        (b"{}", b"{}"),
        (b"null", b"null"),
        (b'{"alg":5}', b"{}"),
        (b'{"alg":["HS256"]}', b"{}"),
        (b'{"alg":"HS256","crit":["exp"]}', json.dumps(claims()).encode()),
        (b'{"alg":"HS256","b64":false,"crit":["b64"]}', json.dumps(claims()).encode()),
        (HEADER, b"\xff\xfe{}"),
        (HEADER, b"[" * 1500),
        (b'{"alg":"HS256","x":' + b"[" * 700, json.dumps(claims()).encode()),
        (HEADER, b'{"sub":"\\ud800"}'),
        (HEADER, json.dumps(claims()).encode()[:-1]),
        (HEADER, json.dumps(claims()).encode() + b"{}"),
    ],
    ids=lambda value: "",  # as in test_keys.py
)
def test_a_malformed_token_is_refused_in_a_sentence(header: bytes, payload: bytes) -> None:
    error = refused(TABLE, signed(header, payload))
    assert error.code == "invalid_api_key"
    assert error.message.startswith("The token")
    assert error.message.endswith(".")


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        *(({name: None}, name) for name in ("sub", "iat", "nbf", "exp", "jti")),
        ({"sub": 5}, "sub"),
        ({"sub": ["x"]}, "sub"),
        ({"exp": "tomorrow"}, "exp"),
        ({"exp": True}, "exp"),
        ({"exp": 10**400}, ""),
        ({"iat": -1}, "iat"),
        ({"nbf": float("nan")}, ""),
        ({"jti": ""}, "jti"),
        ({"jti": "one\n"}, "jti"),
        ({"jti": "j" * 65}, "jti"),
        ({"models": "a"}, "models"),
        ({"models": []}, "models"),
        ({"models": [None]}, "models"),
        ({"networks": []}, "networks"),
        ({"networks": ["10.0.0.1/8"]}, "did you mean 10.0.0.0/8"),
        ({"networks": ["everywhere"]}, "'everywhere' is no network"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 10**30}, ""),
        ({"aud": "another-service"}, "aud"),
        ({"role": "admin"}, "role"),
    ],
)
def test_a_claim_that_is_wrong_or_unknown_is_named(changes: dict[str, Any], name: str) -> None:
    error = refused(TABLE, token(**changes))
    assert error.code == "invalid_api_key"
    assert "The token is malformed" in error.message
    assert name in error.message


@pytest.mark.parametrize("form", ["{}.", ".{}", "{}=", "{}\n", "{}\0", '"{}"', "{} x", "{}.x.y", "é{}"])
def test_the_outer_form_is_strict(form: str) -> None:
    assert refused(TABLE, form.format(token())).code == "invalid_api_key"


def test_a_long_token_is_refused_before_it_is_read() -> None:
    good = token(models=[f"{number:040}" for number in range(60)])
    assert len(good) < 4096
    assert TABLE.authenticate(bearer(good), NOW)
    assert "longer than 4096 bytes" in refused(TABLE, token(models=["m" * 40] * 90)).message
    assert "longer than 4096 bytes" in refused(TABLE, "a." * 2 + "a" * 60_000).message


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"expires_in": 0}, "it must live 1 to 86400 seconds"),
        ({"expires_in": 86_401}, "it must live 1 to 86400 seconds"),
        ({"models": []}, "models"),
        ({"models": ["m"] * 101}, "models"),
        ({"models": [f"{number:0100}" for number in range(60)]}, "longer than 4096 bytes"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_nothing_is_issued_that_would_be_refused(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        tokens.issue(RECORD.id, SECRET, **{"expires_in": 60, "now": NOW, **arguments})


# The cache of verified tokens


@pytest.fixture
def verifications(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    seen: list[bytes] = []
    real: Callable[[bytes, str], bool] = tokens.is_signed_by

    def is_signed_by(token: bytes, secret: str) -> bool:
        seen.append(token)
        return real(token, secret)

    monkeypatch.setattr(tokens, "is_signed_by", is_signed_by)
    return seen


def test_a_token_is_verified_once(verifications: list[bytes]) -> None:
    table = KeyTable([RECORD], MASTER)
    first = table.authenticate(bearer(token()), NOW)
    assert table.authenticate(bearer(token()), NOW + 3600) is first
    assert len(verifications) == 1


def test_a_refused_token_is_never_remembered(verifications: list[bytes]) -> None:
    table = KeyTable([RECORD], MASTER)
    for _ in range(3):
        refused(table, broken(token()))
    assert len(verifications) == 3


def test_the_oldest_token_is_forgotten_when_there_are_too_many(
    verifications: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "_MAX_CACHED", 3)
    table = KeyTable([RECORD], MASTER)
    made = [bearer(token(jti=f"{number}")) for number in range(4)]
    for one in made:
        table.authenticate(one, NOW)
    assert len(table._verified) == 3
    for one in reversed(made):
        table.authenticate(one, NOW)
    assert len(verifications) == 5


# Anything at all

# A busy machine is no fault of the code.
patiently = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
JSON = PLAIN | st.lists(PLAIN, max_size=3) | st.dictionaries(st.text(max_size=8), PLAIN, max_size=2)
NAMES = st.sampled_from([*tokens.Claims.__struct_fields__, "aud"])
TIMES = st.integers(NOW - 10**5, NOW + 10**5)


@patiently
@given(st.dictionaries(NAMES, JSON, max_size=3), TIMES)
def test_any_signed_claims_are_taken_whole_or_refused(changes: dict[str, Any], now: int) -> None:
    plain = {**claims(), **changes}
    made = signed(HEADER, json.dumps(plain).encode())
    try:
        principal = TABLE.authenticate(bearer(made), now)
    except AuthenticationFailed:
        return
    assert set(plain) <= set(tokens.Claims.__struct_fields__)
    assert plain["sub"] == principal.id == RECORD.id
    assert plain["jti"] == principal.token_id
    assert max(plain["iat"], plain["nbf"]) - 60 <= now < plain["exp"] + 60 <= plain["iat"] + 86_460
    assert principal.models == (None if plain.get("models") is None else frozenset(plain["models"]))
    assert principal.max_tokens == plain.get("max_tokens")


@patiently
@given(st.binary(max_size=60), st.binary(max_size=60), st.sampled_from([SECRET, "x"]))
@example(HEADER, b"{" * 60, SECRET)
def test_any_signed_bytes_are_refused(header: bytes, payload: bytes, secret: str) -> None:
    assert refused(TABLE, signed(header, payload, secret)).status == 401


ALPHABET = (string.ascii_letters + string.digits + "-_.=").encode()


# But for the last character: 32 bytes in base64 leave two of its bits without a meaning.
@patiently
@given(st.integers(0, len(token()) - 2), st.sampled_from(ALPHABET))
def test_a_token_with_one_byte_changed_is_refused(place: int, byte: int) -> None:
    good = token()
    changed = good[:place] + chr(byte) + good[place + 1 :]
    if changed != good:
        assert refused(TABLE, changed).status == 401


def test_a_token_is_good_again_when_the_clock_is_set_back() -> None:
    table = KeyTable([RECORD], MASTER)
    for now, code in (
        (NOW, None),
        (NOW - 100, "token_not_yet_valid"),
        (NOW + 9999, "token_expired"),
        (NOW, None),
    ):
        if code is None:
            assert table.authenticate(bearer(token()), now)
        else:
            assert refused(table, token(), now).code == code


def test_the_recipe_in_the_documents_makes_good_tokens() -> None:
    """`make_token` there needs nothing but the standard library."""
    page = Path(__file__).resolve().parents[2] / "docs" / "keys.md"
    recipe: dict[str, Any] = {}
    [code] = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    exec(code, recipe)
    api_key = f"DSK-{RECORD.id}-{'x' * 43}"
    principal = TABLE.authenticate_key(recipe["make_token"](api_key, SECRET).encode())
    assert (principal.id, principal.models) == (RECORD.id, None)
    narrow = recipe["make_token"](api_key, SECRET, 60, models=["a"], networks=["10.0.0.0/8"], max_tokens=9)
    principal = TABLE.authenticate_key(narrow.encode())
    assert (principal.models, principal.max_tokens) == (frozenset("a"), 9)
    assert principal.networks == (ip_network("10.0.0.0/8"),)
