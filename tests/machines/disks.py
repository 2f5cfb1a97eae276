"""What lies on a machine's disk before it boots."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from tests.machines.rig import Machine
from tests.network.rig import call

IGNITION = "/usr/lib/dracut/modules.d/30ignition/ignition"  # where Debian and Fedora have it
PLACES = (
    "usr/lib/systemd/system",
    "usr/lib/systemd/system-generators",
    "usr/bin",
    "etc/init.d",
)
# $1 image layers, $2 the machine's directory, $3 ours, $4 the program, $5 the configuration.
# The stages an initramfs runs on a disk that is there. Debian's build relabels files for SELinux
# whatever the system, so it gets a configuration to find, and a setfiles that has nothing to do.
_IGNITE = """
mkdir -p "$2/root" "$2/disk" "$2/work" "$3/bin"
mount -t overlay overlay -o "lowerdir=$1,upperdir=$2/disk,workdir=$2/work" "$2/root"
mkdir -p "$2/root/etc/selinux"
printf 'SELINUX=disabled\\nSELINUXTYPE=targeted\\n' >"$2/root/etc/selinux/config"
ln -s /bin/true "$3/bin/setfiles"
for stage in fetch files; do
    PATH="$3/bin:$PATH" IGNITION_CONFIG_FILE="$5" IGNITION_SYSTEM_CONFIG_DIR="$3/none" "$4" \\
        --root="$2/root" --platform=file --stage="$stage" --config-cache="$3/cache" \\
        --state-file="$3/state" --neednet="$3/neednet" --log-to-stdout
done
rm -r "$2/root/etc/selinux"
umount "$2/root"
"""


def put(machine: Machine, name: str, text: str, mode: int = 0o644) -> None:
    """A file on the disk of a machine that is off."""
    path = machine.hardware.disk / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)


def remove_cloud_init(machine: Machine) -> None:
    """Take the program, its generator and its units off the disk, as overlayfs does it."""
    for layer in machine.hardware.layers:
        for place in PLACES:
            for path in (layer / place).glob("cloud-*"):
                target = machine.hardware.disk / place / path.name
                target.parent.mkdir(parents=True, exist_ok=True)
                if not os.path.lexists(target):
                    os.mknod(target, stat.S_IFCHR, 0)


def ignite(machine: Machine, config: str) -> str:
    """Have the real Ignition write to the disk of a machine that is off; what it logged."""
    with tempfile.TemporaryDirectory() as ours:
        path = Path(ours) / "config.ign"
        path.write_text(config)
        layers = ":".join(map(str, machine.hardware.layers))
        argv = ["unshare", "--mount", "--propagation=private", "sh", "-euc", _IGNITE, "ignite"]
        argv += [layers, str(machine.hardware.directory), ours, IGNITION, str(path)]
        return call(argv, check=True, timeout=60).stdout
