"""Blocking calls in threads of their own, which nobody waits for at the end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar, cast

T = TypeVar("T")


def aside(call: Callable[[], T]) -> asyncio.Future[T]:
    """Call it in a thread; the future gets its result or exception.

    A name server or web server that does not answer keeps a thread for minutes. One of an executor
    would hold up the program's end for as long, and everybody else's calls: this does neither. So
    whoever gives up the wait must not call again before that future is done.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def deliver(result: T | None, error: Exception | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(cast("T", result))

    def run() -> None:
        result, failure = None, None
        try:
            result = call()
        except Exception as error:  # noqa: BLE001  whatever it is, it is the caller's
            failure = error
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(deliver, result, failure)

    threading.Thread(target=run, name="aside", daemon=True).start()
    return future


class Question(Generic[T]):
    """One blocking call that is asked again and again, but never twice at a time."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._asking: asyncio.Future[T] | None = None

    async def ask(self, seconds: float) -> T:
        """The call's result; TimeoutError after `seconds`, with the call perhaps still under way.

        In that case the next `ask` waits for that same call.
        """
        if self._asking is None:
            self._asking = aside(self._call)
        done, _ = await asyncio.wait({self._asking}, timeout=seconds)
        if not done:
            raise TimeoutError
        asked, self._asking = self._asking, None
        return asked.result()
