"""The way of blocking code into one event loop in one daemon thread, and of callbacks back into its threads."""

from __future__ import annotations

import atexit
import logging
import sys
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from functools import partial, wraps
from inspect import isawaitable, iscoroutinefunction
from queue import SimpleQueue
from threading import Event, RLock, get_ident
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, TypeVar, cast

from anyio.from_thread import BlockingPortal, BlockingPortalProvider

P = ParamSpec("P")
T = TypeVar("T")
A = TypeVar("A")
S = TypeVar("S")
Inbox = SimpleQueue[Callable[[], object] | None]
"""What a thread does while it waits for its call; None: the call is over."""

logger = logging.getLogger("agent_sdk")

_portals = BlockingPortalProvider()
_END: Any = object()


class Caller:
    """One object's way into the loop, for any number of threads at once; each call has an inbox of its own.

    What is passed to one call (`on_output=`) runs in the thread of that call. What belongs to the object (its
    callbacks) runs one at a time and in order, in the thread that has waited longest; when nobody waits, it is
    kept for the next call.
    """

    def __init__(self, end: Callable[[], object]) -> None:
        """Make one; `end` closes the object, and is called when the program ends before somebody did."""
        self._end = end
        self._lock = RLock()  # the handler of a signal may call while its thread is in here
        self._portal: BlockingPortal | None = None
        self._loop_thread = 0
        self._calls = 0
        self._closed = False
        self._posted: deque[Callable[[], object]] = deque()
        self._waiting: list[Inbox] = []
        self._asked: Inbox | None = None
        """Of the thread that is to run, or runs, the first of what was posted."""
        self._running: int | None = None
        """That thread, while it runs it."""

    def open(self) -> None:
        """Keep the loop running, until `close`."""
        self._closed = False
        self._enter()
        self._leave()

    def close(self) -> None:
        """Let go of the loop when the calls under way are over; it ends with the last who does."""
        self._closed = True
        self._leave(0)

    def post(self, function: Callable[..., object], *arguments: object) -> None:
        """From the loop: have a thread that waits run this, after what was posted before."""
        with self._lock:
            self._posted.append(partial(function, *arguments))
            self._ask()

    def call(self, function: Callable[..., Awaitable[T]], *args: Any, **kwargs: Any) -> T:
        """Run an async function in the loop and wait, running callbacks meanwhile, also those given as `on_…=`.

        Ctrl-C cancels it and waits until it has cleaned up; a second one does not wait.

        Raises:
            RuntimeError: this is the loop's own thread, which would wait for itself.
        """
        inbox: Inbox = SimpleQueue()
        over = Event()
        here = _callbacks(kwargs, lambda told: lambda *arguments: inbox.put(partial(told, *arguments)))

        async def work() -> tuple[T | None, BaseException | None]:
            self._loop_thread = get_ident()
            try:
                return await function(*args, **here), None
            except (KeyboardInterrupt, SystemExit) as exc:  # would end the loop of all others
                return None, exc
            finally:
                over.set()

        portal = self._enter()
        try:
            future = portal.start_task_soon(work)
            future.add_done_callback(lambda _: inbox.put(None))
            try:
                self._wait(inbox)
            except BaseException:
                future.cancel()
                over.wait()
                raise
            result, failure = future.result()
            if failure is not None:
                raise failure
            return cast(T, result)
        finally:
            self._leave()

    def iterate(self, function: Callable[..., AsyncIterator[T]], *args: Any, **kwargs: Any) -> Iterator[T]:
        """Run an async iterator in the loop, one item at a time."""
        iterator = cast("AsyncGenerator[T, None]", function(*args, **kwargs))
        try:
            while (item := self.call(anext, iterator, _END)) is not _END:
                yield item
        finally:
            self._finish(iterator)

    def _finish(self, iterator: AsyncGenerator[T, None]) -> None:
        """Close it in its loop; where that is not possible, the loop does so by itself when it finds it unused."""
        if self._portal is not None and get_ident() != self._loop_thread and not sys.is_finalizing():
            self.call(iterator.aclose)

    # --- the loop ---

    def _enter(self) -> BlockingPortal:
        with self._lock:
            if get_ident() == self._loop_thread:
                raise RuntimeError(
                    "a blocking call in the event loop's own thread would wait for itself; "
                    "async functions use the async API"
                )
            if self._portal is None:
                self._portal = _portals.__enter__()
                atexit.register(
                    self._at_exit
                )  # a loop that is frozen in mid-air would hold the program up for ever
            self._calls += 1
            return self._portal

    def _leave(self, calls: int = 1) -> None:
        with self._lock:
            self._calls -= calls
            if not self._closed or self._calls or self._portal is None:
                return
            self._portal, self._loop_thread = None, 0
            atexit.unregister(self._at_exit)
        _portals.__exit__(None, None, None)

    def _at_exit(self) -> None:
        try:
            self._end()
        except Exception as exc:  # noqa: BLE001  whatever it is, the program ends
            logger.warning("what was left open could not be closed: %s", exc)
        finally:
            self.close()

    # --- callbacks ---

    def _wait(self, inbox: Inbox) -> None:
        """Run what comes until the call is over, and then what was posted before its end and nobody else will run."""
        with self._lock:
            inside = self._running == get_ident()
            if not inside:  # a callback that calls: the next callback comes after it
                self._waiting.append(inbox)
                self._ask()
        try:
            while (item := inbox.get()) is not None:
                self._run(item)
            with self._lock:
                left = len(self._posted) if self._waiting == [inbox] else 0
            for _ in range(left):
                if (item := inbox.get()) is not None:
                    self._run(item)
        finally:
            with self._lock:
                if not inside:
                    self._waiting.remove(inbox)
                if self._asked is inbox:
                    self._asked = None
                self._ask()

    def _ask(self) -> None:
        if self._posted and self._waiting and self._asked is None:
            self._asked = self._waiting[0]
            self._asked.put(self._run_posted)

    def _run_posted(self) -> None:
        with self._lock:
            item = self._posted.popleft()
            self._running = get_ident()
        try:
            self._run(item)
        finally:
            with self._lock:
                self._running = self._asked = None
                self._ask()

    def _run(self, item: Callable[[], object]) -> None:
        try:
            result = item()
            if isawaitable(result):
                self.call(lambda: result)
        except Exception:  # a callback is the user's; its error must not stop the others
            logger.exception("a callback failed")


class Twin:
    """Something async, blocking; each of its names is made from one of the contract by a function below."""

    def __init__(self, caller: Caller, asynchronous: Any) -> None:
        self._caller = caller
        self.asynchronous = asynchronous
        """What is behind it."""


def blocking(method: Callable[Concatenate[Any, P], Awaitable[T]]) -> Callable[Concatenate[Any, P], T]:
    """Return the twin of an async method: the same name, arguments and docstring; it blocks."""
    return _twin(method, Caller.call)


def iterating(
    method: Callable[Concatenate[Any, P], AsyncIterator[T]],
) -> Callable[Concatenate[Any, P], Iterator[T]]:
    """Return the twin of a method that makes an async iterator."""
    return _twin(method, Caller.iterate)


def making(
    method: Callable[Concatenate[Any, P], Any], kind: Callable[[Caller, Any], T]
) -> Callable[Concatenate[Any, P], T]:
    """Return the twin of a method, async or not, whose result has a twin of this kind."""
    is_async = iscoroutinefunction(method)

    def make(caller: Caller, function: Callable[..., Any], *args: Any, **kwargs: Any) -> T:
        made = caller.call(function, *args, **kwargs) if is_async else function(*args, **kwargs)
        return kind(caller, made)

    return _twin(method, make)


def ending(method: Callable[Concatenate[Any, P], Awaitable[T]]) -> Callable[Concatenate[Any, P], T]:
    """Return the twin of an async method that lets go of the loop at its end."""

    def end(caller: Caller, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return caller.call(function, *args, **kwargs)
        finally:
            caller.close()

    return _twin(method, end)


def _twin(method: Callable[..., Any], call: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def twin(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        return call(self._caller, getattr(self.asynchronous, method.__name__), *args, **kwargs)

    return twin


class Fact(property, Generic[T]):
    """The twin of a property."""

    if TYPE_CHECKING:

        def __get__(self, twin: Any, kind: type | None = None, /) -> T: ...  # type: ignore[override]


def fact(of: Callable[[Any], T]) -> Fact[T]:
    """Return the twin of a property."""
    return part(of, lambda _, value: value)


def part(of: Callable[[Any], Any], kind: Callable[[Caller, Any], T]) -> Fact[T]:
    """Return the twin of a property whose value has a twin of this kind."""
    asked = cast("Any", of).fget

    @wraps(asked)
    def get(twin: Twin) -> T:
        return kind(twin._caller, getattr(twin.asynchronous, asked.__name__))

    return Fact(get)


def constructed(
    make: Callable[P, A],
) -> Callable[[Callable[[S, A], None]], Callable[Concatenate[S, P], None]]:
    """Decorate the `__init__` of a twin, which gets what `make` returns, to take the arguments of `make`.

    What is given as `on_…=` runs in a thread that waits.
    """

    def decorated(init: Callable[[S, A], None]) -> Callable[Concatenate[S, P], None]:
        @wraps(make.__init__)
        def __init__(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> None:
            post = partial(partial, lambda *told: self._caller.post(*told))
            init(self, make(*args, **_callbacks(kwargs, post)))

        return __init__

    return decorated


def _callbacks(arguments: Mapping[str, Any], wrap: Callable[[Any], object]) -> dict[str, Any]:
    """Wrap what is called back, by its name."""
    return {
        name: wrap(value) if name.startswith("on_") and callable(value) else value
        for name, value in arguments.items()
    }
