"""The campaign with the core and the simulator compiled: ``make sim`` runs a million seeds by it.

``python -m tests.sim.compiled ARGUMENTS`` copies this tree's sources into build/compiled, has mypyc
(it comes with mypy) compile those that decide and those that simulate, and runs `tests.sim` there.
The sources are the same, so every seed's events are: `--narrate` shows it, and a test compares.
Compiled code does about twice as much a second. What tests patch or derive from stays as it is.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMPILED = (
    *("peers", "hubs", "situation", "voter", "membership", "supplying", "assembly"),
    *("election", "enrolment"),
)
SIMULATED = ("world", "machine", "invariants", "befall", "outcome")
SETUP = """
from mypyc.build import mypycify
from setuptools import setup
setup(name="compiled", ext_modules=mypycify({paths!r}, opt_level="2"))
"""


def compiled() -> Path:
    """The directory with this tree's compiled copy, made if it is not there; some 30 seconds."""
    sources = [*ROOT.glob("firstboot/**/*"), *ROOT.glob("tests/sim/*.py")]
    sources = sorted(p for p in sources if p.is_file() and p.suffix != ".pyc")
    digest = hashlib.sha256(sys.version.encode())
    for path in sources:
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    target = ROOT / "build/compiled" / digest.hexdigest()[:12]
    if not target.exists():
        print("compiling the simulator", file=sys.stderr)
        work = target.with_name(f"{target.name}.{os.getpid()}")
        for path in [*sources, ROOT / "tests/__init__.py"]:
            copy = work / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        _compile(work)
        work.rename(target)
    return target


def _compile(work: Path) -> None:
    paths = [f"firstboot/protocol/{name}.py" for name in COMPILED]
    paths += [f"tests/sim/{name}.py" for name in SIMULATED]
    arguments = ["--python-version=3.11", "--ignore-missing-imports", *paths]
    (work / "setup.py").write_text(SETUP.format(paths=arguments))
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = subprocess.run(build, cwd=work, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"mypyc cannot compile the simulator:\n{done.stdout}{done.stderr}")


def main() -> None:
    """Become `tests.sim` of the compiled copy."""
    directory = compiled()
    os.environ["PYTHONPATH"] = str(directory)
    # -P: not from the directory where this runs, which has the sources.
    os.execv(sys.executable, [sys.executable, "-P", "-m", "tests.sim", *sys.argv[1:]])


if __name__ == "__main__":
    main()
