"""Typed configuration: defaults < YAML file < `key=value` on the command line, and nothing unknown gets through."""

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from unitok.core.errors import ConfigError

ConfigT = TypeVar("ConfigT", bound="Config")


class Config(BaseModel):
    """Base of every configuration part. Unknown fields are refused and assignments are checked."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, coerce_numbers_to_str=True)


class _Loader(yaml.SafeLoader):
    """Safe YAML, unlike version 1.1 with 1e-3 as a number, 0100 as a hundred and 2026-01-31 as text."""


def _without(resolvers: dict[str, list], *tags: str) -> dict[str, list]:
    full = {f"tag:yaml.org,2002:{tag}" for tag in tags}
    return {first: [pair for pair in pairs if pair[0] not in full] for first, pairs in resolvers.items()}


_Loader.yaml_implicit_resolvers = _without(yaml.SafeLoader.yaml_implicit_resolvers, "timestamp", "int")
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?\d[\d_]*$"), list("-+0123456789"))
_Loader.add_constructor(
    "tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node).replace("_", ""))
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def parse_value(text: str) -> Any:
    """The value of one `key=value` override, read as YAML."""
    return yaml.load(text, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader


def load_config(
    cls: type[ConfigT], file: Path | str | None = None, overrides: Sequence[str] = (), where: str | None = None
) -> ConfigT:
    """Build `cls` from its defaults, then the YAML `file` (see `config_path`), then `key.sub=value` overrides.

    A part given in the file replaces only the fields it names; the others keep the enclosing class's defaults.
    Raises ConfigError, in one line, for an unknown key (with the nearest known one) or a value that does not fit.
    """
    values = default_values(cls)
    if file is not None:
        path = config_path(file)
        _merge(values, read_yaml(path), cls)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"override {override!r} is not of the form key=value (for example optimizer.lr=1e-3)")
        try:
            value = parse_value(text)
        except (yaml.YAMLError, ValueError) as error:  # ValueError: a value that its own tag contradicts (!!int x)
            raise ConfigError(f"override {override!r}: the value is not valid YAML ({_one_line(error)})") from error
        _set_dotted(values, key.strip(), value, cls)
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, cls, where or file)) from error


def config_path(name: Path | str) -> Path:
    """`name` if it is a file, else the packaged configuration of that name ("tokenizer/shapes.yaml").

    Raises ConfigError that lists the packaged ones if there is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    packaged = Path(str(resources.files("unitok.configs")))
    relative = Path(*path.parts[1:]) if path.parts[:1] == ("configs",) else path
    for candidate in (relative, relative.with_name(relative.name + ".yaml")):
        if not path.is_absolute() and (packaged / candidate).is_file():
            return packaged / candidate
    known = sorted(str(found.relative_to(packaged)) for found in packaged.rglob("*.yaml"))
    raise ConfigError(f"configuration {str(name)!r} is neither a file nor a packaged one; packaged: {', '.join(known)}")


def has_config(name: Path | str) -> bool:
    """Whether `config_path` finds it."""
    try:
        config_path(name)
    except ConfigError:
        return False
    return True


def save_config(config: Config | Mapping[str, Any], path: Path | str) -> None:
    """Write the resolved configuration as YAML (atomically); `load_config` reads it back to an equal one."""
    values = config.model_dump(mode="json") if isinstance(config, Config) else dict(config)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    os.replace(temporary, path)


def known_keys(cls: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """All dotted keys of `cls`, parts and leaves."""
    for name, field in cls.model_fields.items():
        yield prefix + name
        part = _part_type(field.annotation)
        if part is not None:
            yield from known_keys(part, f"{prefix}{name}.")


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values in a YAML file; ConfigError where it holds something else."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader
    except (yaml.YAMLError, ValueError) as error:  # UnicodeDecodeError is a ValueError
        raise ConfigError(f"{path} is not valid YAML: {_one_line(error)}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}; expected keys and values")
    return content


def _part_type(annotation: Any) -> type[BaseModel] | None:
    """The configuration class in an annotation (`Part` or `Part | None`), or None."""
    options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    parts = [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
    return parts[0] if len(parts) == 1 else None


def default_values(cls: type[BaseModel]) -> dict[str, Any]:
    """The default values as nested dicts; required fields are absent, required parts hold their own defaults."""
    values: dict[str, Any] = {}
    for name, field in cls.model_fields.items():
        if field.is_required():
            part = _part_type(field.annotation)
            if part is not None:
                values[name] = default_values(part)
            continue
        default = field.get_default(call_default_factory=True, validated_data={})
        values[name] = default.model_dump() if isinstance(default, BaseModel) else default
    return values


def _merge(values: dict[str, Any], update: Mapping[str, Any], cls: type[BaseModel]) -> None:
    for key, value in update.items():
        field = cls.model_fields.get(key)
        part = _part_type(field.annotation) if field is not None else None
        if part is not None and isinstance(value, Mapping):
            if not isinstance(values.get(key), dict):
                values[key] = default_values(part)
            _merge(values[key], value, part)
        else:
            values[key] = value


def _set_dotted(values: dict[str, Any], key: str, value: Any, cls: type[BaseModel]) -> None:
    """Set one dotted key; inside a free-form dict field the keys below are simply set."""
    *parents, last = key.split(".")
    part: type[BaseModel] | None = cls
    for depth, name in enumerate(parents):
        if part is not None and name not in part.model_fields:
            raise ConfigError(_unknown(key, cls))
        part = _part_type(part.model_fields[name].annotation) if part is not None else None
        if values.get(name) is None:
            values[name] = default_values(part) if part is not None else {}
        if not isinstance(values[name], dict):
            prefix = ".".join(parents[: depth + 1])
            raise ConfigError(f"{key}: {prefix} is the value {values[name]!r} and has no keys below it")
        values[name] = dict(values[name])  # a default must not be changed in place
        values = values[name]
    if part is not None:
        if last not in part.model_fields:
            raise ConfigError(_unknown(key, cls))
        _merge(values, {last: value}, part)
    else:
        values[last] = value


def _unknown(key: str, cls: type[BaseModel]) -> str:
    known = list(dict.fromkeys(known_keys(cls)))
    last = key.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    near = near or [k for k in known if k.rsplit(".", 1)[-1] == last][:1]
    near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return f"unknown key {key!r}; the nearest known key is {near[0]!r}" if near else f"unknown key {key!r}"


def _explain(error: ValidationError, cls: type[BaseModel], where: Path | str | None) -> str:
    """One line for the first problems pydantic found (all of them, shortened to three)."""
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            lines.append(_unknown(key, cls))
        elif problem["type"] == "missing":
            lines.append(f"{key} is not set and has no default; give it in the file or as {key}=VALUE")
        elif problem["type"] == "value_error":
            lines.append(f"{key}: {problem['ctx']['error']}" if key else str(problem["ctx"]["error"]))
        else:
            lines.append(f"{key} = {problem['input']!r}: {_lower_first(problem['msg'])}")
    shown = "; ".join(dict.fromkeys(lines[:3])) + (f"; and {len(lines) - 3} more" if len(lines) > 3 else "")
    return _one_line(f"{shown} (in {where})" if where else shown)


def _lower_first(text: str) -> str:
    return text.replace("Input should be", "expected", 1) if text.startswith("Input") else text[:1].lower() + text[1:]


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
