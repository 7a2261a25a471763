"""Keywords of a method besides those in its signature: other names for its parameters, and options."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any


def further_keywords(
    aliases: Mapping[str, str], options: type[Any], attribute: str
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a method so that it takes more keywords, while its signature stays as written.

    Args:
        aliases: parameters by their other names.
        options: a class whose keyword arguments are taken too; an instance of it is kept as `attribute` of the object.

    The method raises TypeError as Python does for a keyword that is neither, or for a parameter given twice.
    """
    taken = set(options.__dataclass_fields__)

    def decorate(method: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(method)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
            setattr(self, attribute, options(**{name: kwargs.pop(name) for name in taken & kwargs.keys()}))
            for alias, name in aliases.items():
                if alias in kwargs:
                    if name in kwargs:
                        raise TypeError(f"{alias} is another name of {name}; give one of them")
                    kwargs[name] = kwargs.pop(alias)
            method(self, *args, **kwargs)

        return wrapper

    return decorate
