"""A web server at the switch, 10.77.0.1:8080, for machines of a rig."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.machines.rig import Rig

URL = "http://10.77.0.1:8080"
# Says when it listens: the test must not be faster.
SERVER = """
import functools, http.server, sys
handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=sys.argv[1])
server = http.server.ThreadingHTTPServer(("10.77.0.1", 8080), handler)
print("listening", flush=True)
server.serve_forever()
"""


@contextlib.contextmanager
def web(rig: Rig, directory: Path) -> Iterator[None]:
    """Serve the files of a directory over http until the block ends."""
    argv = ["nsenter", f"--net=/run/netns/{rig.network.switch}", "--"]
    server = subprocess.Popen(
        [*argv, sys.executable, "-c", SERVER, str(directory)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == b"listening\n"
        yield
    finally:
        server.kill()
        server.communicate()
