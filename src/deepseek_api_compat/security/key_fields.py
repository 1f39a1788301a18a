"""What an operator says about a key, checked: parameters as they came in JSON, columns as they are stored."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from typing import Annotated, Any, TypeVar, get_args

import msgspec
from msgspec import UNSET, UnsetType

from deepseek_api_compat.errors import SetupError, WrongValue
from deepseek_api_compat.security.scope import model_name, network
from deepseek_api_compat.store.base import MICRO, KeyRecord, Role

_Struct = TypeVar("_Struct", bound=msgspec.Struct)
MAX_NAME = 100  # characters
MAX_OWNER = 200
MAX_ITEMS = 100  # models or networks of one key
MAX_BUDGET = 10**12  # units of the currency

_Rate = Annotated[float, msgspec.Meta(ge=0, le=1e9)] | None | UnsetType
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)] | None | UnsetType
_Time = Annotated[int, msgspec.Meta(ge=0, le=253_402_300_799)] | None | UnsetType
_Items = Annotated[list[str], msgspec.Meta(min_length=1, max_length=MAX_ITEMS)] | None | UnsetType


class _Limits(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    rps: _Rate = UNSET
    burst: _Count = UNSET
    rpm: _Count = UNSET
    tpm: _Count = UNSET
    tpd: _Count = UNSET
    concurrency: _Count = UNSET


class _Fields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    name: str | UnsetType = UNSET
    role: str | UnsetType = UNSET
    owner: Annotated[str, msgspec.Meta(max_length=MAX_OWNER)] | UnsetType = UNSET
    enabled: bool | UnsetType = UNSET
    expires: _Time = UNSET
    models: _Items = UNSET
    networks: _Items = UNSET
    limits: _Limits | UnsetType = UNSET
    budget: Decimal | UnsetType | None = UNSET


def read_fields(op: str, params: Mapping[str, Any], now: float) -> dict[str, Any]:
    """The fields that `params` gives, as a store takes them: limits one by one, money in micro-units.

    {name, role, owner, enabled, expires, models, networks, limits: {rps, ...}, budget}, none of them needed.
    Raises WrongValue.
    """
    found = msgspec.structs.asdict(convert(op, params, _Fields))
    limits = found.pop("limits")
    if limits is not UNSET:
        found.update(msgspec.structs.asdict(limits))
    given = {name: value for name, value in found.items() if value is not UNSET}
    for name, read in _READERS.items():
        if given.get(name) is not None:
            given[name] = _read(name, read, given[name])
    if given.get("expires") is not None and given["expires"] <= now:
        raise WrongValue("A key must expire in the future; to refuse it now, disable it.", "expires")
    return given


def _read(name: str, read: Callable[[Any], Any], value: Any) -> Any:
    try:
        return read(value)
    except SetupError as error:
        raise WrongValue(str(error), name) from None


def convert(op: str, params: Mapping[str, Any], struct: type[_Struct]) -> _Struct:
    """`params` as this struct. Raises WrongValue."""
    try:
        return msgspec.convert(params, struct)
    except (msgspec.ValidationError, OverflowError) as error:
        problem, _, place = str(error).partition(" - at `$.")
        place = place.rstrip("`")
        unknown = re.search("unknown field `(.*)`", problem)
        field = f"{place}.{unknown[1]}".lstrip(".") if unknown else place or None
        where = f"{place}: " if place else ""
        sentence = f"Wrong parameters for {op}: {where}{problem[:1].lower()}{problem[1:]}."
        raise WrongValue(sentence, field) from None


def shown(record: KeyRecord, now: float) -> dict[str, Any]:
    """All of a key but its hashes, as plain data for JSON.

    Money is a decimal number in a string. `old_key_until`: unix seconds while the key before the last
    rotation is good too, else None.
    """
    overlaps = record.old_until is not None and now < record.old_until
    return {
        "id": record.id,
        "name": record.name,
        "role": record.role,
        "owner": record.owner,
        "enabled": record.enabled,
        "created": record.created,
        "expires": record.expires,
        "models": None if record.models is None else list(record.models),
        "networks": None if record.networks is None else list(record.networks),
        "limits": msgspec.structs.asdict(record.limits),
        "budget": None if record.budget is None else money(record.budget),
        "old_key_until": record.old_until if overlaps else None,
    }


def money(micro: int) -> str:
    """Micro-units as a decimal number, without zeros at its end."""
    units, rest = divmod(micro, MICRO)
    return f"{units}.{rest:06}".rstrip("0").rstrip(".")


def _name(text: str) -> str:
    if not 0 < len(text) <= MAX_NAME or not text.isprintable():
        raise SetupError(f"A key's name must have 1 to {MAX_NAME} printable characters.")
    return text


def _role(name: str) -> str:
    if name not in get_args(Role):
        raise SetupError(f"A key's role must be one of {', '.join(get_args(Role))}, not {name!r}.")
    return name


def _owner(text: str) -> str:
    if not text.isprintable():
        raise SetupError("A key's owner must be printable text.")
    return text


def _models(names: Iterable[str]) -> tuple[str, ...]:
    return _each(names, model_name)


def _networks(texts: Iterable[str]) -> tuple[str, ...]:
    return _each(texts, lambda text: str(network(text)))


def _each(texts: Iterable[str], read: Callable[[str], str]) -> tuple[str, ...]:
    """What `read` makes of each, without repetitions."""
    try:
        return tuple(dict.fromkeys(read(text) for text in texts))
    except ValueError as error:
        raise SetupError(str(error)) from None


def _budget(amount: Decimal) -> int:
    if not amount.is_finite() or not 0 <= amount <= MAX_BUDGET or amount != round(amount, 6):
        raise SetupError(f"A key's budget must be between 0 and {MAX_BUDGET}, with 6 decimals at most.")
    return int(amount * MICRO)


_READERS: dict[str, Callable[[Any], Any]] = {
    "name": _name,
    "role": _role,
    "owner": _owner,
    "models": _models,
    "networks": _networks,
    "budget": _budget,
}
