"""The providers of one run, side by side: none of them keeps another waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from functools import partial

from firstboot.discovery import providers
from firstboot.discovery.interface import Context, Provider, Stranger
from firstboot.protocol.model import Endpoint


class Search:
    """Looks for peers by every provider that `listed` names; all is called on the event loop."""

    def __init__(self, listed: Iterable[tuple[str, providers.Options]], platform: str) -> None:
        self._chosen = providers.choose(listed, platform)
        self.providers: list[Provider] = []
        self._under_way: dict[str, asyncio.Task[None]] = {}

    def load(self) -> None:
        """Import what takes long, while something else is waited for."""
        providers.load(name for name, _ in self._chosen)

    async def begin(
        self,
        context: Context,
        own: Endpoint,
        found: Callable[[Endpoint, str], None],
        stranger: Stranger,
    ) -> None:
        """Start the providers; `found` also gets the name of the one that found it."""
        for name, options in self._chosen:
            provider = providers.make(name, options, context)
            self.providers.append(provider)
            await provider.start(own, partial(_found_by, found, name), stranger)

    def announce(self, done: Callable[[], None]) -> None:
        """Let each announce this host and look again, but for those that still do.

        `done` is called after each.
        """
        for provider in self.providers:
            running = self._under_way.get(provider.name)
            if running is None or running.done():
                task = asyncio.ensure_future(provider.announce())
                task.add_done_callback(lambda _: done())
                self._under_way[provider.name] = task

    def close(self) -> None:
        """Begin to stop all of them."""
        for provider in self.providers:
            task = asyncio.ensure_future(provider.stop())
            self._under_way[f"stop {provider.name}"] = task

    async def end(self) -> None:
        """Stop all of them, whatever they are doing."""
        for task in self._under_way.values():
            task.cancel()
        for provider in self.providers:
            await provider.stop()


def _found_by(found: Callable[[Endpoint, str], None], name: str, at: Endpoint) -> None:
    found(at, name)
