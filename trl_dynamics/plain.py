"""Values as JSON and YAML can hold them: text, numbers, booleans, None, lists and dictionaries of these."""

import dataclasses
import enum
import json
import math
import os
from collections.abc import Mapping, Set

import yaml

# What numpy and torch have no plain value for, but a name that their own functions take.
_NAMED = ("dtype", "device", "DType")


class NotPlainError(TypeError):
    """A value that JSON and YAML cannot hold, such as a function."""


def plain(value: object) -> object:
    """`value` in plain Python, equal in content.

    Numbers of numpy become Python's, arrays and sets lists, a dtype or device its name (`"float16"`), a path its text,
    an enum its value, a dataclass or an object with `to_dict` a dictionary. Plain values come back as they are.

    Raises:
        NotPlainError: If there is no such form; the type is named.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, type):
        raise NotPlainError(f"a class ({value.__name__}) is no plain value")
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if isinstance(value, Mapping):
        return {_key(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Set):
        return sorted((plain(item) for item in value), key=repr)
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return _from_object(value)


def finite_or_none(value: float | None) -> float | None:
    """The value, or None, which JSON can hold, where it is NaN or infinite."""
    return value if value is not None and math.isfinite(value) else None


def yaml_text(fields: Mapping[str, object]) -> str:
    """Fields as YAML, by name; those without a plain form are left out, and named in a comment."""
    written, left_out = {}, []
    for name, value in fields.items():
        try:
            written[name] = plain(value)
        except NotPlainError:
            left_out.append(name)
    comment = f"# Left out, having no plain value: {', '.join(sorted(left_out))}\n" if left_out else ""
    return comment + yaml.safe_dump(written, sort_keys=True, allow_unicode=True)


def json_text(value: object, indent: int | None = None) -> str:
    """A value as JSON; a part without a plain form is written as its `repr`."""
    return json.dumps(plain_or_text(value), indent=indent, ensure_ascii=False)


def plain_or_text(value: object) -> object:
    """[`plain`], and where a part of `value` has no plain form, its `repr` in its place."""
    try:
        return plain(value)
    except NotPlainError:
        pass
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else repr(key): plain_or_text(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_or_text(item) for item in value]
    return repr(value)


def _key(key: object) -> object:
    key = plain(key)
    if isinstance(key, (list, dict)):
        raise NotPlainError(f"a key that is a {type(key).__name__} is no plain value")
    return key


def _from_object(value: object) -> object:
    kind = type(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if kind.__module__.split(".")[0] in ("torch", "numpy") and kind.__name__.endswith(_NAMED):
        return str(value).removeprefix("torch.")
    if callable(getattr(value, "tolist", None)):
        return plain(value.tolist())
    if callable(getattr(value, "to_dict", None)):
        return plain(value.to_dict())
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    raise NotPlainError(f"a {kind.__name__} is no plain value")
