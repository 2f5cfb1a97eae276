"""Where this host is: its facts as soon as it has an address, and whether the address changes."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from firstboot import host
from firstboot.journal import WARNING, Journal
from firstboot.protocol.errors import FirstbootError
from firstboot.publisher import Publisher
from firstboot.userdata import Document

CLOUD_FACTS = {"launch_index", "reservation", "instance_id", "zone", "tag"}


async def found(
    root: Path, wanted: Document, publisher: Publisher, stop: asyncio.Event
) -> host.Facts | None:
    """This host's facts, as soon as it has an address; None if `stop` is set before."""

    def look() -> host.Facts:
        return host.facts(root, wanted.interface, wanted.cidr, wanted.port)

    def say(sentence: str, hint: str) -> None:
        publisher.waiting_for_address(wanted.config.cluster, sentence, hint)

    facts = look()
    there = facts.address is not None and not host.is_stopgap(facts.address, wanted.cidr)
    if there or (wanted.config.expect == 1 and not wanted.late):
        return facts  # a cluster of one needs no network
    gc.enable()  # this may take days
    while not stop.is_set():
        coming = host.wait_for_address(wanted.interface, wanted.cidr, say=say)
        waiting = [asyncio.ensure_future(coming), asyncio.ensure_future(stop.wait())]
        done, rest = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in rest:
            task.cancel()
        for task in done:
            task.result()  # an error of the kernel's is not to be waited out
        facts = look()
        if facts.address is not None:  # it may have gone again
            return facts
    return None


async def moved(wanted: Document, known: str, settled: Callable[[], bool]) -> str:
    """The address this host is to use instead of `known`, once there is a reason for that."""
    other = host.wait_for_address(wanted.interface, wanted.cidr, known, settled=settled)
    return (await other).host


async def with_cloud(known: host.Facts, wanted: Document, journal: Journal) -> host.Facts:
    """The facts; with the cloud's, if the document matches by them and cloud-init left none."""
    machine = known.machine
    if not wanted.matched_by & CLOUD_FACTS or machine.instance_id or not known.platform:
        return known
    from firstboot.discovery import imds
    from firstboot.discovery.aside import aside

    try:
        asked = await aside(lambda: imds.instance_data(known.platform))
    except FirstbootError as error:
        journal.say(f"Hosts are matched without the cloud: {error}.", priority=WARNING)
        return known
    return replace(known, machine=host.with_cloud(machine, asked))
