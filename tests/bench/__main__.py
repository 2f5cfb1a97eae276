"""How fast N hosts form, beside what people would use instead: see docs/benchmark.md.

All systems in one run on one machine, in turn, so that whatever else the machine does meets each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.bench.report import Series, as_json, table
from tests.bench.systems import Etcd, Firstboot, NotFormedError, Serf, System
from tests.network.rig import Network, call
from tests.network.run import wait_until

SYSTEMS: tuple[System, ...] = (Firstboot(), Serf(), Etcd())
ETCD_MEMBERS = 3  # more would only be slower; people run three


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; 1 if a formation of firstboot's failed."""
    options = _options(arguments)
    chosen = [s for s in SYSTEMS if s.name in options.systems]
    for system in list(chosen):
        if system.missing():
            _say(f"{system.name} is left out: {system.missing()}")
            chosen.remove(system)
    _say(f"load before: {os.getloadavg()[0]:.2f} (it should be near 0)")
    with contextlib.ExitStack() as stack:
        networks = [stack.enter_context(Network(n)) for n in options.hosts]
        for network in networks:
            settle(network)
        series = _measure(networks, chosen, options.runs)
    text = table(series)
    print(text)
    if options.report:
        options.report.parent.mkdir(parents=True, exist_ok=True)
        options.report.with_suffix(".txt").write_text(f"{text}\n")
        plain = json.dumps(as_json(series), indent=1)
        options.report.with_suffix(".json").write_text(f"{plain}\n")
        _say(f"written: {options.report.with_suffix('.txt')} and .json")
    failed = [reason for s in series for reason in s.failed if s.system == "firstboot"]
    for reason in failed:
        _say(reason)
    return 1 if failed else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--runs", type=int, default=30, help="formations of each kind")
    parser.add_argument("--hosts", type=int, nargs="+", default=[3, 5, 10])
    names = [s.name for s in SYSTEMS]
    parser.add_argument("--systems", nargs="+", choices=names, default=names)
    parser.add_argument("--report", type=Path, help="write PATH.txt and PATH.json")
    return parser.parse_args(arguments)


def settle(network: Network) -> None:
    """Until what is sent arrives: before its link is up, a host's packets are dropped silently.

    Nor may an address be tentative: serf would fail to send, and wait for a minute.
    """

    names = [network.switch, *(network.namespace(n).name for n in network.hosts)]

    def settled() -> bool:
        for name in names:
            links = call(["ip", "-n", name, "link"]).stdout.splitlines()
            if any("state UP" not in link for link in links if "@" in link):  # veth(4) pairs
                return False
            if call(["ip", "-n", name, "-6", "addr", "show", "tentative"]).stdout:
                return False
        return True

    wait_until(settled, 60, "every link is up and no address tentative")


def _measure(networks: Sequence[Network], systems: Sequence[System], runs: int) -> list[Series]:
    """`runs` rounds; each lets every system form once with every number of hosts."""
    pairs = [
        (system, network, Series(system.name, len(network.hosts)))
        for network in networks
        for system in systems
        if system.name != "etcd" or len(network.hosts) == ETCD_MEMBERS
    ]
    began = time.monotonic()
    for number in range(runs + 1):
        for system, network, series in pairs:
            if number == 0:
                series = Series("warm-up", series.hosts)  # programs and byte code get cached
            _once(system, network, series)
        told = f"round {number} of {runs}, {time.monotonic() - began:.0f} s" if number else "warm"
        last = [
            f"{s.system} {s.hosts}: {s.seconds('', y.marks[-1])[-1]:.3f}"
            for y, _, s in pairs
            if number
        ]
        _say("  ".join([told, *last]))
    return [series for _, _, series in pairs]


def _once(system: System, network: Network, series: Series) -> None:
    directory = network.owner.directory / "formation"
    directory.mkdir()
    try:
        series.formations.append(system.form(network, directory))
    except NotFormedError as error:
        series.failed.append(f"{system.name}, {len(network.hosts)} hosts: {error}")
    finally:
        shutil.rmtree(directory)
        os.sync()  # what is still unwritten would slow whoever comes next


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
