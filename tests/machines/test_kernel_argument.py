"""Machines that are told nothing but by their kernel's command line, as network boot does it."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from firstboot.userdata import make_token
from tests.machines.document import document
from tests.machines.rig import Rig
from tests.machines.test_cluster import FORM, firstboot, sentence, state, wait_running
from tests.machines.web import URL, web

pytestmark = pytest.mark.machine

Launch = Callable[..., Rig]
KEPT = "/run/firstboot/config.d/50-kernel-argument.yaml"


def test_a_document_from_a_web_server_that_comes_late(launch: Launch, tmp_path: Path) -> None:
    text = document(3, payload="none", election="{grace: 10s}")
    (tmp_path / "demo.yaml").write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    url = f"{URL}/demo.yaml"
    words = (f"firstboot.config={url}", f"firstboot.config.digest=sha256:{digest}")
    rig = launch(3, "", words=words)
    rig.set_seed()
    rig.start()
    told = f"Waiting for the document at {url}: connection refused: nothing listens there yet."
    rig.wait(lambda: all(sentence(m) == told for m in rig), FORM, "every host says what it lacks")
    rig.ready()  # nothing of the boot waits for it
    page = firstboot(rig[1], "status")
    assert page.returncode == 2
    assert "firstboot.config on the kernel's command line names it" in page.stdout
    with web(rig, tmp_path):
        wait_running(rig)
    assert len({(m.status() or {})["cluster_id"] for m in rig}) == 1
    for machine in rig:
        assert machine.exec("stat", "-c", "%a", KEPT).stdout == "600\n"
        assert "config.yaml" not in machine.exec("ls", "/etc/firstboot").stdout
    # Once it is done its role needs the document no more, and there is no server now. A master is
    # done when the grace period is over.
    stamp = "/var/lib/firstboot/complete"
    rig.wait(lambda: not rig[1].exec("test", "-e", stamp, check=False).returncode, FORM, "done")
    rig[1].reboot()
    rig.wait(lambda: state(rig[1]) == "running", FORM, "it is back")
    assert rig[1].exec("ls", "/run/firstboot").stdout == "status.json\n"


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """A block device that holds this text as /firstboot.yaml, and links out of it and in it."""
    made = []

    def make(text: str) -> str:
        tree, image = tmp_path / "tree", tmp_path / "image"
        tree.mkdir()
        (tree / "firstboot.yaml").write_text(text)
        (tree / "out.yaml").symlink_to("../../../etc/firstboot/config.yaml")
        (tree / "in.yaml").symlink_to("firstboot.yaml")
        argv = ["mke2fs", "-q", "-t", "ext2", "-L", "FIRSTBOOT", "-d", str(tree), str(image), "1M"]
        subprocess.run(argv, check=True)
        found = subprocess.run(
            ["losetup", "--find", "--show", "--read-only", str(image)],
            check=True, capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip
        made.append(found)
        return found

    yield make
    for name in made:
        subprocess.run(["losetup", "--detach", name], check=True)


def test_a_document_on_a_device(launch: Launch, device: Callable[[str], str]) -> None:
    token = make_token()
    seed = device(document(1, token, payload="none"))
    rig = launch(
        1, "", binds=(f"{seed}:{seed}",), words=("firstboot.config=LABEL=FIRSTBOOT:/in.yaml",)
    )
    rig.set_seed()
    rig.start()
    wait_running(rig)
    assert rig[1].exec("stat", "-c", "%a", KEPT).stdout == "600\n"
    assert "/run/firstboot" not in rig[1].read("/proc/mounts")
    rig.wait(lambda: token not in rig[1].read(KEPT), FORM, "the token is taken out of the copy")
    assert "cluster: demo" in rig[1].read(KEPT)
    rig.wait(lambda: "LABEL=FIRSTBOOT:/in.yaml" in firstboot(rig[1], "status").stdout, FORM, "told")
    # The same machine, had it been given a device that points to the machine's own files.
    rig[1].write("/etc/firstboot/config.yaml", "cluster: demo\n", 0o600)
    ask = (
        "import sys; sys.path.insert(0, '/usr/share/firstboot')\n"
        "from pathlib import Path; from firstboot.userdata import Source, fetch\n"
        "from firstboot.userdata.fetch import fetch\n"
        "try: fetch(Source(sys.argv[1], '/out.yaml', ''), Path('/run/firstboot'))\n"
        "except Exception as error: print(error)"
    )
    said = rig[1].exec("python3", "-c", ask, seed).stdout
    assert said == "/out.yaml leads out of the device\n"
