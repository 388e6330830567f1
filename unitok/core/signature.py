"""A strict configuration part made from a constructor's signature, so that sizes are written down in one place."""

import inspect
from typing import Any, get_type_hints

from pydantic import create_model

from unitok.core.config import Config


def config_from_signature(cls: type, name: str, skip: tuple[str, ...] = ()) -> type[Config]:
    """A `Config` class whose fields are the keyword parameters of `cls.__init__`, with their types and defaults."""
    hints = get_type_hints(cls.__init__)
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(cls.__init__).parameters.values():
        if parameter.name == "self" or parameter.name in skip or parameter.kind is parameter.VAR_KEYWORD:
            continue
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[parameter.name] = (hints.get(parameter.name, Any), default)
    return create_model(name, __base__=Config, **fields)
