"""The history file: whatever happens to it, the formation goes on."""

from __future__ import annotations

from pathlib import Path

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
