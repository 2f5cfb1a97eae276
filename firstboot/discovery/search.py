"""The providers of one run, side by side: none of them keeps another waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

from firstboot.discovery import providers
from firstboot.discovery.interface import Context, Provider, ProviderReport, Stranger
from firstboot.protocol.model import Endpoint

MAX_TEXT = 300  # characters of a provider's error or remedy


class Search:
    """Looks for peers by every provider that `listed` names; all is called on the event loop."""

    def __init__(self, listed: Iterable[tuple[str, providers.Options]], platform: str) -> None:
        self._chosen = providers.choose(listed, platform)
        self._providers: list[Provider] = []
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
            self._providers.append(provider)
            await provider.start(own, partial(_found_by, found, name), stranger)

    def reports(self) -> list[ProviderReport]:
        """How each fares, in texts that are short and printable, wherever they came from."""
        return [_shown(provider.report()) for provider in self._providers]

    def announce(self, done: Callable[[], None]) -> None:
        """Let each announce this host and look again, but for those that still do.

        `done` is called after each.
        """
        for provider in self._providers:
            running = self._under_way.get(provider.name)
            if running is None or running.done():
                task = asyncio.ensure_future(provider.announce())
                task.add_done_callback(lambda _: done())
                self._under_way[provider.name] = task

    def close(self) -> None:
        """Begin to stop all of them."""
        for provider in self._providers:
            task = asyncio.ensure_future(provider.stop())
            self._under_way[f"stop {provider.name}"] = task

    async def end(self) -> None:
        """Stop all of them, whatever they are doing."""
        for task in self._under_way.values():
            task.cancel()
        for provider in self._providers:
            await provider.stop()


def _shown(report: ProviderReport) -> ProviderReport:
    return replace(
        report,
        error=_printable(report.error),
        detail=_printable(report.detail),
        remedy=_printable(report.remedy),
    )


def _printable(text: str) -> str:
    clean = "".join(c if c.isprintable() else "?" for c in text[:MAX_TEXT])
    return clean if len(text) <= MAX_TEXT else f"{clean}…"


def _found_by(found: Callable[[Endpoint, str], None], name: str, at: Endpoint) -> None:
    found(at, name)
