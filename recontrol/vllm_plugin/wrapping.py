"""Making methods of vLLM do something more."""

import functools
from collections.abc import Callable
from typing import Any


def wrap(owner: Any, name: str, *, before: Callable[..., Any] | None = None, after: Callable[..., Any] | None = None) -> None:
    """Make a method of a class, or of one object, call something first or last with its own arguments; done once, however often it is asked for."""
    method = getattr(owner, name, None)
    if method is None:
        called = owner.__name__ if isinstance(owner, type) else type(owner).__name__
        raise ImportError(f"this release of vLLM has no {called}.{name}, which the plugin recontrol needs")
    if getattr(vars(owner).get(name), "recontrol", False):
        return

    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before(*args, **kwargs)
        result = method(*args, **kwargs)
        if after is not None:
            after(*args, **kwargs)
        return result

    wrapped.recontrol = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)
