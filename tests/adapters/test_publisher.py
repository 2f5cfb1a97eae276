"""The history file: whatever happens to it, the formation goes on."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from firstboot.publisher import HISTORY, MAX_HISTORY, Recorder


def test_lines_are_appended_to_what_earlier_runs_wrote(tmp_path: Path) -> None:
    for run in ("first", "second"):
        recorder = Recorder(tmp_path)
        recorder.line(run)
        recorder.close()
        recorder.line("after the end")
    path = tmp_path / HISTORY
    assert path.read_text() == "first\nsecond\n"
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_full_disk_ends_the_history_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / HISTORY).symlink_to("/dev/full")
    recorder = Recorder(tmp_path)
    for _ in range(3):
        recorder.line("x" * 20_000)
        recorder.flush()
    recorder.close()


def test_a_directory_that_takes_no_file_is_no_error(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "absent")
    recorder.line("x")
    recorder.flush()
    recorder.close()


def test_a_history_is_bounded(tmp_path: Path) -> None:
    (tmp_path / HISTORY).write_bytes(b"x" * MAX_HISTORY)
    recorder = Recorder(tmp_path)
    for _ in range(3):
        recorder.line("y" * 100)
        recorder.flush()
    recorder.close()
    assert (tmp_path / HISTORY).stat().st_size < MAX_HISTORY + 1000


def test_a_disk_that_breaks_between_two_lines_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(tmp_path)
    recorder.line("one")
    recorder.flush()

    class Broken:
        def __getattr__(self, name: str) -> object:
            def fail(*_: object) -> None:
                raise OSError(errno.EIO, name)

            return fail

    monkeypatch.setattr(recorder, "_file", Broken())
    recorder.line("two")
    recorder.flush()
    recorder.close()
    assert (tmp_path / HISTORY).read_text() == "one\n"
