"""Verbs there, made by construction from the verb of the contract and the method that is named after it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, Self, TypeVar

from agent_sdk.protocol.methods.method import Done, Method
from agent_sdk.remote.link import Link, ask
from agent_sdk.workspace.verbs import KEYS, call_of, method_of, verbs

Verb = TypeVar("Verb", bound=Callable[..., Any])
T = TypeVar("T")


class Part:
    """A part of a workspace there. What its contract has and its class does not write is asked of the other end."""

    def __init__(self, link: Link, key: str = "") -> None:
        """Take the way to it, and which one it is, where a workspace has several."""
        self._link = link
        self._key = key

    @classmethod
    def of(cls, link: Link, key: str = "") -> Self:
        """Return one: to type checkers, which do not see the verbs that are made here, its class is abstract."""
        return cls(link, key)

    def __init_subclass__(cls, *, part: str) -> None:
        for name, verb in verbs(part).items():
            if name not in vars(cls):
                method = method_of(part, name)
                if method is None:
                    raise TypeError(
                        f"{cls.__name__}.{name} is not written, and no method {part}.{name} says it without bytes"
                    )
                setattr(cls, name, asking(verb, method, KEYS.get(part)))
        super().__init_subclass__()

    async def _ask(self, call: Method[T]) -> T:
        return await ask(self._link, call)


def asking(verb: Verb, method: type[Method[Any]], key: str | None = None) -> Verb:
    """Return the verb as a call of this method: the same name, arguments and docstring.

    `key` is the param for the `_key` of the object whose verb it is.
    """

    @wraps(verb)
    async def asked(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        given = _signature(verb).bind(self, *args, **kwargs)
        given.apply_defaults()
        _, *arguments = given.arguments.items()
        named = {} if key is None else {key: self._key}
        answer = await self._ask(call_of(method, {**named, **dict(arguments)}))
        return None if isinstance(answer, Done) else answer

    return asked  # type: ignore[return-value]


@cache
def _signature(verb: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(verb)
