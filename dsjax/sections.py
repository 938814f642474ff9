"""Plain values into frozen sections: names, types and text, told apart by the annotations of a dataclass.

Knows nothing of what the sections mean; every mistake becomes one sentence that names the field.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable
from typing import Any, TypeVar

Section = TypeVar("Section")


class ConfigError(ValueError):
    """A user's mistake in a configuration or on the command line, told in one sentence."""


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """`; did you mean X?` for the name nearest to `name`, or the valid names where none is near."""
    names = list(names)
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]}?" if near else f"; valid are {', '.join(names)}"


def build(section: type[Section], values: Any, path: str = "") -> Section:
    """A `section` from a dict of plain values; what is missing keeps its default.

    path: the dotted name of the section, for messages; "" at the top.
    Raises ConfigError for an unknown name or a wrong type.
    """
    kinds = fields(section)
    if not isinstance(values, dict):
        raise ConfigError(f"{path or 'the configuration'} must be a section of fields, but got {values!r}")
    arguments = {}
    for name, value in values.items():
        dotted = f"{path}.{name}" if path else str(name)
        if name not in kinds:
            raise ConfigError(f"unknown {'field' if path else 'section'} {dotted}{did_you_mean(str(name), kinds)}")
        arguments[name] = _convert(kinds[name], value, dotted)
    return section(**arguments)


def override(root: type, values: dict[str, Any], path: str, text: str) -> None:
    """Puts `text`, read as the field's type asks, at the dotted `path` of nested `values`; types are left to `build`.

    A section that is None comes into being with its defaults. Raises ConfigError for an unknown name.
    """
    if path not in paths(root):
        raise ConfigError(unknown(root, path))
    if "\0" in text:
        raise ConfigError(f"{path} holds a null character")
    *parents, last = path.split(".")
    section = root
    for depth, name in enumerate(parents):
        section = _required(fields(section)[name])
        if values.get(name) is None:
            values[name] = {}
        values = values[name]
        if not isinstance(values, dict):
            build(section, values, ".".join(parents[: depth + 1]))
    values[last] = _read(fields(section)[last], text)


def unknown(root: type, path: str) -> str:
    """The sentence for a dotted name that `root` does not have, with the nearest one that it has."""
    known = paths(root)
    parent, _, last = path.rpartition(".")
    if parent and parent not in known:
        return unknown(root, parent)
    if parent and not any(name.startswith(parent + ".") for name in known):
        return f"unknown field {path}; {parent} is a field, not a section"
    siblings = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == parent}
    anywhere = {name.rpartition(".")[2]: name for name in known}
    near = [siblings[name] for name in difflib.get_close_matches(last, siblings, n=1)]
    near += [anywhere[name] for name in difflib.get_close_matches(last, anywhere, n=1, cutoff=0.8)]
    remedy = f"did you mean {near[0]}?" if near else f"valid are {', '.join(siblings.values())}"
    return f"unknown {'field' if parent else 'section'} {path}; {remedy}"


def fields(section: type) -> dict[str, Any]:
    """The fields of a section and their types."""
    return typing.get_type_hints(section)


def paths(section: type, prefix: str = "") -> list[str]:
    """The dotted names of everything below a section, the sections themselves included."""
    found = []
    for name, kind in fields(section).items():
        found.append(prefix + name)
        if dataclasses.is_dataclass(_required(kind)):
            found += paths(_required(kind), f"{prefix}{name}.")
    return found


def _required(kind: Any) -> Any:
    """`X` of `X | None`, any other type as it is."""
    if isinstance(kind, types.UnionType):
        return next(option for option in typing.get_args(kind) if option is not type(None))
    return kind


def _read(kind: Any, text: str) -> Any:
    """The value that `text` writes for a field of type `kind`; the text itself where it writes none."""
    inner = _required(kind)
    if inner is not kind and text.lower() == "none":
        return None
    if inner is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if typing.get_origin(inner) is tuple:
        return [_read(typing.get_args(inner)[0], part.strip()) for part in text.split(",") if part.strip()]
    for number in (int, float) if inner in (int, float) else ():
        try:
            return number(text)
        except ValueError:
            pass
    return text


def _convert(kind: Any, value: Any, path: str) -> Any:
    """`value` as `kind`, where that loses nothing (2e3 is a whole number, a list is a tuple); else ConfigError."""
    inner = _required(kind)
    if value is None and inner is not kind:
        return None
    if dataclasses.is_dataclass(inner) and isinstance(inner, type):
        return build(inner, value, path)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and _is_finite(value)
    if inner is int and is_number and value == int(value):
        return int(value)
    if inner is float and is_number:
        return float(value)
    if inner is str and isinstance(value, str) and "\0" in value:
        raise ConfigError(f"{path} holds a null character")
    if inner in (bool, str) and isinstance(value, inner):
        return value
    if typing.get_origin(inner) is tuple and isinstance(value, (list, tuple)):
        return tuple(_convert(typing.get_args(inner)[0], item, path) for item in value)
    raise ConfigError(f"{path} must be {_description(inner)}{' or None' * (inner is not kind)}, but got {value!r}")


def _is_finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float reaches
        return False


def _description(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        return f"a tuple ({_description(typing.get_args(kind)[0])} each)"
    return {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text"}[kind]
