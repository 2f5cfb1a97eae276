"""systemd over D-Bus: reload, enable, start, follow a unit to its result.

Blocking calls for a worker thread. Each call makes its own connections, so any number of threads
may use one `Systemd`. Interfaces and properties are those of org.freedesktop.systemd1(5).
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from firstboot.protocol.errors import LocalError

_NAME = "org.freedesktop.systemd1"
_PATH = "/org/freedesktop/systemd1"
_MANAGER = f"{_NAME}.Manager"
_UNIT = f"{_NAME}.Unit"
_PROPERTIES = "org.freedesktop.DBus.Properties"
_MISSING = (f"{_NAME}.NoSuchUnit", "org.freedesktop.DBus.Error.FileNotFound")
_CALL_SECONDS = 30.0  # systemd answers in milliseconds unless the host is in deep trouble
_JOURNAL_SECONDS = 5.0
_LOG_LINES, _LOG_COLUMNS = 10, 300
# A unit that systemd restarts (Restart=on-failure) may fail once or twice because something it
# talks to is not there yet; at the third time it is taken at its word.
PATIENCE = 3
_WITH_RESULT = ("service", "socket", "mount", "automount", "swap", "path", "timer", "scope")
_WORDS = {
    "timeout": "it did not become ready in time",
    "oom-kill": "the kernel killed it for lack of memory",
    "watchdog": "it stopped answering its watchdog",
    "protocol": "it ended without telling that it is ready",
    "start-limit-hit": "it failed too often in a short time",
    "resources": "systemd could not get the resources to start it",
    "not-found": "there is no such unit",
    "masked": "it is masked",
    "bad-setting": "its unit file has a bad setting",
    "error": "its unit file cannot be read",
    "condition": "one of its conditions is not met",
    "assert": "one of its assertions is not met",
    "ended": "it ended at once, without an error",
    "not-started": "its start was cancelled",
    "deadline": "it was still starting at the deadline",
    "again": "it ends again and again",
}


class SystemdFailed(LocalError):
    """systemd could not be asked."""


class UnitFailed(LocalError):
    """A unit did not become active.

    ``result`` is systemd's word (``exit-code``, ``timeout``, ``oom-kill``, …) or one of those
    above; ``status`` the exit status or the signal's number, 0 if neither; ``log`` the unit's
    last lines in the journal, without control characters.
    """

    def __init__(
        self, unit: str, result: str, reason: str, status: int = 0, log: tuple[str, ...] = ()
    ) -> None:
        super().__init__(f"{unit} failed: {reason}")
        self.unit = unit
        self.result = result
        self.status = status
        self.log = log

    @property
    def detail(self) -> str:
        """The last log lines as one text."""
        return "\n".join(self.log)


@dataclass(frozen=True, slots=True)
class UnitState:
    """A unit at one moment, in systemd's words; times are Unix time, 0 if never.

    ``since_wall``: something about it changed; ``active_wall``: it became active.
    """

    load: str
    active: str
    sub: str
    result: str
    since_wall: float
    active_wall: float = 0.0


class Systemd:
    """The service manager at `bus_address`, None for this host's own.

    `journalctl` is the command that reads that host's journal; empty: logs are not read.
    """

    def __init__(
        self, bus_address: str | None = None, journalctl: Sequence[str] = ("journalctl",)
    ) -> None:
        self._address = bus_address
        self._journalctl = tuple(journalctl)
        self._cancelled = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def cancel(self) -> None:
        """Make every `start` under way, and every later one, raise SystemdFailed soon.

        Without this a process that is told to stop would wait for a unit's deadline: Python
        joins worker threads at exit.
        """
        os.eventfd_write(self._cancelled, 1)

    def close(self) -> None:
        """Give the descriptor back; nothing may be under way."""
        os.close(self._cancelled)

    # ------------------------------------------------------------ verbs

    def reload(self) -> None:
        """Read all unit files anew (daemon-reload)."""
        with self._connection() as bus:
            bus.manager("Reload", "")

    def enable(self, unit: str) -> bool:
        """Enable a unit for every later boot; False if it has no [Install] section to say how."""
        with self._connection() as bus:
            try:
                carries, changes = bus.manager("EnableUnitFiles", "asbb", [unit], False, False)
            except _BusError as error:
                raise self._refused(unit, error) from None
            if changes:
                bus.manager("Reload", "")  # or the new links count only after the next boot
            return bool(carries)

    def is_enabled(self, unit: str) -> bool:
        """Whether a unit is started at boot."""
        with self._connection() as bus:
            path = str(bus.manager("LoadUnit", "s", unit))
            return str(bus.properties(path, _UNIT)["UnitFileState"]).startswith("enabled")

    def state(self, unit: str) -> UnitState:
        """What systemd thinks of a unit; ``load`` is ``not-found`` if there is none."""
        with self._connection() as bus:
            path = str(bus.manager("LoadUnit", "s", unit))
            seen = bus.properties(path, _UNIT)
            return UnitState(
                load=str(seen["LoadState"]),
                active=str(seen["ActiveState"]),
                sub=str(seen["SubState"]),
                result=str(_type_properties(bus, unit, path).get("Result", "")),
                since_wall=int(seen["StateChangeTimestamp"]) / 1e6,
                active_wall=int(seen["ActiveEnterTimestamp"]) / 1e6,
            )

    def start(self, unit: str, deadline: float, *, restart: bool = False) -> None:
        """Start a unit and return once it is active, or has done its work if it is a oneshot.

        With `restart` a unit that is active already is stopped first.
        Raises UnitFailed if it fails, if systemd has restarted it in vain `PATIENCE` times, or
        if that takes longer than `deadline` seconds; the unit is then left to systemd as it is.
        """
        until = time.monotonic() + deadline
        with self._connection() as bus, self._connection() as watcher:
            path = str(bus.manager("LoadUnit", "s", unit))
            watch = _Watch(watcher, path, self._cancelled)  # before the start: nothing is missed
            before = bus.properties(path, _UNIT)
            if before["LoadState"] != "loaded":
                raise self._failed(bus, unit, path, str(before["LoadState"]), {})
            try:
                # Else systemd forgets a oneshot, and how it went, as soon as it has ended.
                bus.call(path, _UNIT, "Ref", "")
                if before["ActiveState"] == "failed":
                    # Else a start after many failures is refused until the limit's interval ends.
                    bus.manager("ResetFailedUnit", "s", unit)
                bus.manager("RestartUnit" if restart else "StartUnit", "ss", unit, "replace")
            except _BusError as error:
                raise self._refused(unit, error) from None
            following = _Following(unit, path, before)
            while not (verdict := following.verdict(bus)):
                if not watch.wait(until):
                    verdict = "deadline"
                    break
            if verdict != "active":
                raise self._failed(bus, unit, path, verdict, following.last)

    def stop(self, unit: str, deadline: float) -> None:
        """Stop a unit and return once it has ended; SystemdFailed after `deadline` seconds.

        One that does not run, or is not there, has ended.
        """
        until = time.monotonic() + deadline
        with self._connection() as bus, self._connection() as watcher:
            path = str(bus.manager("LoadUnit", "s", unit))
            watch = _Watch(watcher, path, self._cancelled)
            try:
                bus.manager("StopUnit", "ss", unit, "replace")
            except _BusError as error:
                if error.name in _MISSING:
                    return
                raise
            while True:
                seen = bus.properties(path, _UNIT)
                if int(seen["Job"][0]) == 0 and seen["ActiveState"] in ("inactive", "failed"):
                    return
                if not watch.wait(until):
                    raise SystemdFailed(f"{unit} did not stop within {deadline:.0f} s")

    def disable(self, unit: str) -> None:
        """Have a unit not started at later boots; nothing if it is not enabled, or not there."""
        with self._connection() as bus:
            try:
                changes = bus.manager("DisableUnitFiles", "asb", [unit], False)
            except _BusError as error:
                if error.name in _MISSING:
                    return
                raise
            if changes:
                bus.manager("Reload", "")

    def ailing(self, unit: str, known: int) -> tuple[int, UnitFailed | None]:
        """How often it has failed since it was told to start; and how, if more often than `known`.

        The number is PATIENCE or more if systemd has given it up. While it runs again, how it
        failed is to be seen in its log only; `result` is then ``again``.
        """
        with self._connection() as bus:
            path = str(bus.manager("LoadUnit", "s", unit))
            # In this order: a restart between the two is then missed for now, not counted twice.
            own = _type_properties(bus, unit, path)
            seen = bus.properties(path, _UNIT)
            count = int(own.get("NRestarts", 0))
            if str(seen["ActiveState"]) == "failed":
                count += PATIENCE
            elif _waits(seen) and int(seen["Job"][0]) == 0:  # with a job it is counted already
                count += 1
            new = count > known
            return count, self._failed(bus, unit, path, "again", own) if new else None

    def log(self, unit: str) -> str:
        """The unit's last lines in the journal, bounded; nothing if they cannot be read."""
        return "\n".join(self._log(unit))

    # ------------------------------------------------------------ failures in words

    def _failed(
        self, bus: _Bus, unit: str, path: str, verdict: str, seen: dict[str, Any]
    ) -> UnitFailed:
        result = str(seen.get("Result", "success"))
        status, code = int(seen.get("ExecMainStatus", 0)), int(seen.get("ExecMainCode", 0))
        reason = _WORDS.get(verdict, verdict)
        if verdict == "dependency":
            reason = f"it needs {_failed_dependency(bus, path)}, which failed"
        elif result != "success" and verdict in ("failed", "deadline", "again"):
            # At the deadline of a unit being restarted, why it fails says more than the time.
            verdict, reason = result, _result_words(result, code, status)
        return UnitFailed(unit, verdict, reason, status, self._log(unit))

    def _refused(self, unit: str, error: _BusError) -> UnitFailed | SystemdFailed:
        result = {
            **dict.fromkeys(_MISSING, "not-found"),
            f"{_NAME}.UnitMasked": "masked",
            f"{_NAME}.BadUnitSetting": "bad-setting",
        }.get(error.name)
        return UnitFailed(unit, result, _WORDS[result]) if result else error

    def _log(self, unit: str) -> tuple[str, ...]:
        """The unit's last lines, bounded in number, length and time; nothing if that fails."""
        if not self._journalctl:
            return ()
        show = ("-n", str(_LOG_LINES), "-o", "cat", "--no-pager", "-q")
        lines: list[str] = []
        # What a dying process said last may be on its way, hence the sync. Its own words tell
        # more than systemd's about it, which come last and would push them out.
        for arguments in (("--sync",), (f"_SYSTEMD_UNIT={unit}", *show), ("-u", unit, *show)):
            if lines:
                break
            try:
                done = subprocess.run(
                    [*self._journalctl, *arguments],
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    timeout=_JOURNAL_SECONDS,
                    check=False,
                )
            except (OSError, subprocess.TimeoutExpired):
                return ()
            lines = done.stdout.decode(errors="replace").splitlines()
        return tuple(_printable(line)[:_LOG_COLUMNS] for line in lines[-_LOG_LINES:])

    @contextmanager
    def _connection(self) -> Iterator[_Bus]:
        bus = _Bus(self._address)
        try:
            yield bus
        finally:
            bus.close()


class _BusError(SystemdFailed):
    """An error reply; ``name`` is the D-Bus error's name."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"systemd refused: {message}" if message else f"systemd refused: {name}")
        self.name = name


class _Bus:
    """A private connection to the message bus, for one thread."""

    def __init__(self, address: str | None) -> None:
        import dbus.bus  # 60 ms, and not needed before the cluster is formed

        self._error = dbus.DBusException
        system = dbus.bus.BusConnection.TYPE_SYSTEM
        try:
            self._connection = dbus.bus.BusConnection(system if address is None else address)
        except self._error as error:
            raise SystemdFailed(f"no message bus: {error.get_dbus_message()}") from None
        # libdbus would end the whole process when the bus goes away.
        self._connection.set_exit_on_disconnect(False)

    def call(self, path: str, interface: str, member: str, signature: str, *arguments: Any) -> Any:
        """Call a method of systemd and return its answer; raise _BusError."""
        try:
            return self._connection.call_blocking(
                _NAME, path, interface, member, signature, arguments, timeout=_CALL_SECONDS
            )
        except self._error as error:
            raise _BusError(error.get_dbus_name() or "", error.get_dbus_message()) from None

    def manager(self, member: str, signature: str, *arguments: Any) -> Any:
        """Call a method of the manager object."""
        return self.call(_PATH, _MANAGER, member, signature, *arguments)

    def properties(self, path: str, interface: str) -> dict[str, Any]:
        """All properties of one moment; asking one by one could mix an old job and a new state."""
        found: dict[str, Any] = self.call(path, _PROPERTIES, "GetAll", "s", interface)
        return found

    def match(self, rule: str) -> None:
        """Have the bus send signals that fit `rule`."""
        try:
            self._connection.add_match_string(f"type='signal',sender='{_NAME}',{rule}")
        except self._error as error:
            raise _BusError(error.get_dbus_name() or "", error.get_dbus_message()) from None

    def fileno(self) -> int:
        """The connection's socket."""
        return int(self._connection.get_unix_fd())

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


class _Watch:
    """Waits until something happened to a unit, without a main loop and without polling.

    dbus-python delivers signals only through GLib's default main context, which the threads of a
    process would have to share. Here a connection that makes no calls of its own gets the
    signals, and only that its socket has data is of interest: what happened is then asked on
    another connection. A change after that answer makes the socket readable again.
    """

    def __init__(self, bus: _Bus, path: str, cancelled: int) -> None:
        bus.match(f"path='{path}',interface='{_PROPERTIES}',member='PropertiesChanged'")
        bus.match(f"path='{_PATH}',interface='{_MANAGER}',member='JobRemoved'")
        bus.manager("Subscribe", "")  # else systemd sends no signals at all
        self._socket = bus.fileno()
        self._cancelled = cancelled
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        self._poll.register(cancelled, select.POLLIN)

    def wait(self, until: float) -> bool:
        """Wait for the next event; False if the clock (monotonic) reached `until` first."""
        remaining = until - time.monotonic()
        if remaining <= 0:
            return False
        ready = {fd for fd, _ in self._poll.poll(remaining * 1000)}
        if self._cancelled in ready:
            raise SystemdFailed("waiting for a unit was cancelled")
        if self._socket in ready:
            self._drain()
        return bool(ready)

    def _drain(self) -> None:
        try:
            while data := os.read(self._socket, 65536):  # libdbus made it non-blocking
                del data
        except BlockingIOError:
            return
        except OSError:
            pass
        raise SystemdFailed("the connection to the message bus is gone")


class _Following:
    """Judges a unit from snapshots of its state since it was told to start."""

    def __init__(self, unit: str, path: str, before: dict[str, Any]) -> None:
        self._unit, self._path, self._before = unit, path, before
        self._restarts: int | None = None  # what systemd's counter showed at first
        self.last: dict[str, Any] = {}  # the type's properties when it last had failed, or now

    def verdict(self, bus: _Bus) -> str:
        """``active``, why not, or an empty string: wait for the next event."""
        seen = bus.properties(self._path, _UNIT)
        own = _type_properties(bus, self._unit, self._path)
        # A restart sets Result back to success: keep the failure, it is what people ask for.
        if str(own.get("Result")) != "success" or not self.last:
            self.last = own
        if self._failures(seen, own) >= PATIENCE:
            return "failed"
        active = str(seen["ActiveState"])
        if int(seen["Job"][0]) != 0:
            return ""  # as long as the job is there, the state may be that from before it
        if active in ("active", "failed"):
            return active
        return self._of_inactive(bus, seen, own) if active == "inactive" else ""

    def _failures(self, seen: dict[str, Any], own: dict[str, Any]) -> int:
        restarts = int(own.get("NRestarts", 0))
        if self._restarts is None or restarts < self._restarts:
            self._restarts = restarts
        return restarts - self._restarts + _waits(seen)

    def _of_inactive(self, bus: _Bus, seen: dict[str, Any], own: dict[str, Any]) -> str:
        for kind in ("Condition", "Assert"):
            if not seen[f"{kind}Result"] and self._differs(seen, f"{kind}TimestampMonotonic"):
                return kind.lower()
        if not self._differs(seen, "InactiveExitTimestampMonotonic"):  # it was never started
            return "dependency" if _failed_dependency(bus, self._path) else "not-started"
        if str(own.get("Result")) == "exec-condition":
            return "condition"
        return "active" if str(own.get("Type")) == "oneshot" else "ended"

    def _differs(self, seen: dict[str, Any], name: str) -> bool:
        return int(seen[name]) != int(self._before[name])


def _waits(seen: dict[str, Any]) -> bool:
    """Whether systemd will restart it in a moment."""
    return str(seen["SubState"]).startswith("auto-restart")


def _type_properties(bus: _Bus, unit: str, path: str) -> dict[str, Any]:
    """The properties that only a unit's type has, such as a service's Result."""
    kind = unit.rpartition(".")[2]
    if kind not in _WITH_RESULT:
        return {}
    try:
        return bus.properties(path, f"{_NAME}.{kind.capitalize()}")
    except _BusError:
        return {}  # a unit that was not loaded has none


def _failed_dependency(bus: _Bus, path: str) -> str:
    """The first unit this one requires that is failed or missing, else an empty string."""
    seen = bus.properties(path, _UNIT)
    for kind in ("Requires", "Requisite", "BindsTo"):
        for name in seen[kind]:
            other = bus.properties(str(bus.manager("LoadUnit", "s", name)), _UNIT)
            if other["ActiveState"] == "failed" or other["LoadState"] != "loaded":
                return str(name)
    return ""


def _result_words(result: str, code: int, status: int) -> str:
    if result == "exit-code":
        # Without a main process it was a command before or after it (ExecStartPre=, …).
        return f"it exited with status {status}" if status else "one of its commands failed"
    if result in ("signal", "core-dump"):
        names = {s.value: s.name for s in signal.Signals}
        named = names.get(status, f"signal {status}")
        return f"it was killed by {named}" if code > 1 else "one of its commands was killed"
    return _WORDS.get(result, result)


def _printable(line: str) -> str:
    """Without control characters: a log line must not steer the console it is shown on."""
    return "".join(c if c.isprintable() else " " for c in line).rstrip()
