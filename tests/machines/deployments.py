"""The image as ostree has it: composed from layers, installed on disks, booted, updated.

Everything is done by the `ostree` program and its parts in the image; each command and what it said
is printed. Two things are not there and stood in for: a kernel, of which ostree wants a file, and
the boot loader, which is the few lines of `LOADER`. The initramfs' work is done by the image's own
ostree-prepare-root.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.network.rig import call

BRANCH = "firstboot/x86_64/stable"
STATEROOT = "host"
REMOTE = "updates"
UPDATES = "/run/updates"  # where machines see the builder's repository
# What a Debian tree has and an image has not: mount points are made anew, the state directories
# are empty or links into /var, and what is enabled follows from presets alone.
# The last line is weight that nothing here reads.
LEFT_OUT = (
    *("/dev", "/proc", "/run", "/sys", "/tmp", "/boot", "/var", "/home", "/root", "/srv", "/opt"),
    *("/mnt", "/media", "/etc/systemd/system", "/etc/machine-id"),
    *("/usr/share/perl", "/usr/share/perl5", "/usr/share/zoneinfo", "/usr/share/i18n"),
)
LINKS = {name: f"var/{name}" for name in ("home", "srv", "opt", "mnt", "media")} | {
    "root": "var/roothome",
    "tmp": "sysroot/tmp",
    "ostree": "sysroot/ostree",
}
# What belongs to a base and not to firstboot: the directories that LINKS lead to, the network, the
# presets of Fedora's kind (all is off but what is named), and cloud-init's seed.
BASE = {
    "usr/lib/tmpfiles.d/base.conf": "".join(
        f"d /var/{name} {mode} root root -\n"
        for name, mode in [*((n, "0755") for n in LINKS if n != "root"), ("roothome", "0700")]
        if name not in ("tmp", "ostree")
    )
    + "d /var/log/journal 2755 root systemd-journal -\n",
    "usr/lib/systemd/system-preset/90-base.preset": "enable systemd-networkd.service\n"
    "enable cloud-*.service\nenable cloud-init.target\nenable ostree-remount.service\n"
    "enable ostree-finalize-staged.path\n",
    "usr/lib/systemd/system-preset/99-default-disable.preset": "disable *\n",
    "usr/lib/systemd/network/20-eth0.network": "[Match]\nName=eth0\n[Network]\nDHCP=no\n"
    "LinkLocalAddressing=no\nIPv6AcceptRA=no\nKeepConfiguration=yes\n",
    "usr/lib/modules/6.1.0-none/vmlinuz": "no kernel: these machines share the real host's\n",
    "etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
    "etc/resolv.conf": "",
    "etc/cloud/cloud.cfg.d/90-machines.cfg": "datasource_list: [NoCloud, None]\n"
    "datasource: {NoCloud: {seedfrom: /run/seed/}}\n"
    "network: {config: disabled}\nmanage_etc_hosts: false\nlocale: false\n",
}
# The boot loader takes the newest entry, or the one that "menu" names (1 is the newest); the
# initramfs then makes the deployment the root. /run is the initramfs' own: it leaves a mark there.
LOADER = """
root=$directory/root menu=$(cat "$directory/menu" 2>/dev/null || echo 1)
mount --bind "$directory/disk" "$root"
entry=$(ls "$root"/boot/loader/entries/*.conf | sort -rV | sed -n "${menu}p")
sed -n 's/^options //p' "$entry" >"$directory/cmdline"
deployment=$root$(sed 's/.*ostree=//; s/ .*//' "$directory/cmdline")
mkdir -p "$directory/run"
mount --bind "$directory/run" /run
mount --bind "$directory/cmdline" /proc/cmdline
# It mounts at /sysroot.tmp for a moment, which machines that boot at once share here.
flock / "$deployment/usr/lib/ostree/ostree-prepare-root" "$root"
umount /proc/cmdline /run
mount --bind "$root/sysroot/ostree/deploy/STATEROOT/var" "$root/var"
""".replace("STATEROOT", STATEROOT)


def shown(*command: str | Path, said: bool = True) -> str:
    """Run a command to its end, print it and what it said."""
    done = call([str(word) for word in command], check=True, timeout=300)
    told(command, done.stdout + done.stderr if said else "")
    return done.stdout


def told(command: Sequence[str | Path], output: str) -> None:
    """Print a command and what it said."""
    print("$", *command)
    print("".join(f"    {line}\n" for line in output.splitlines()), end="", flush=True)


@dataclass(frozen=True, slots=True)
class Builder:
    """Who makes images: a repository below `directory`, and machines' disks from it."""

    directory: Path

    @property
    def repository(self) -> Path:
        """Where the commits are."""
        return self.directory / "repo"

    def start(self, base: Sequence[Path]) -> None:
        """Commit the base: trees of which the first is topmost."""
        self._ostree("init", "--mode=bare")
        self._ostree("config", "set", "core.fsync", "false")  # it does not outlive the test
        skip = self.directory / "left-out"
        skip.write_text("".join(f"{path}\n" for path in LEFT_OUT))
        trees = [f"--tree=dir={tree}" for tree in reversed(base)]
        self._ostree("commit", "--branch=base/debian", f"--skip-list={skip}", *trees)
        own = self.directory / "base"
        for name, text in BASE.items():
            (own / name).parent.mkdir(parents=True, exist_ok=True)
            (own / name).write_text(text)
        self.layer("base/machines", own)

    def layer(self, branch: str, tree: Path) -> None:
        """Commit a layer; root owns it, whoever made it."""
        owner = ("--owner-uid=0", "--owner-gid=0", "--no-xattrs")
        self._ostree("commit", f"--branch={branch}", *owner, f"--tree=dir={tree}")

    def compose(self, layers: Path, version: str) -> str:
        """Commit an image of the base and all directories in `layers`; the new commit."""
        branches = ["base/debian", "base/machines"]
        for tree in sorted(layers.iterdir()):
            branches.append(f"overlay/{tree.name}")
            self.layer(branches[-1], tree)
        refs = [f"--tree=ref={branch}" for branch in branches]
        self._ostree("commit", "--branch=united", *refs)
        tree = self.directory / "tree"
        self._ostree("checkout", "--require-hardlinks", "united", tree)
        (tree / "etc").rename(tree / "usr/etc")
        for name in ("dev", "proc", "run", "sys", "boot", "var", "sysroot"):
            (tree / name).mkdir()
        for name, target in LINKS.items():
            (tree / name).symlink_to(target)
        commit = self._ostree(
            "commit",
            f"--branch={BRANCH}",
            f"--add-metadata-string=version={version}",
            "--link-checkout-speedup",
            f"--tree=dir={tree}",
        )
        shutil.rmtree(tree)
        return commit.strip()

    def latest(self) -> str:
        """The newest image's commit."""
        return self._ostree("rev-parse", BRANCH).strip()

    def install(self, directory: Path, *, readonly: bool) -> Mapping[str, Any]:
        """Install the image on a machine's disk; what the rig has to know of it.

        `readonly`: /sysroot too is mounted read-only, as Fedora does.
        """
        disk = directory / "disk"
        disk.mkdir()
        repository = disk / "ostree/repo"
        admin = ("ostree", "admin", f"--sysroot={disk}")
        shown("ostree", "admin", "init-fs", disk)
        shown(*admin, "os-init", STATEROOT)
        for key, value in {"bootloader": "none", "readonly": str(readonly).lower()}.items():
            shown("ostree", f"--repo={repository}", "config", "set", f"sysroot.{key}", value)
        url = f"file://{UPDATES}"
        shown(*("ostree", f"--repo={repository}", "remote", "add", "--no-gpg-verify", REMOTE, url))
        shown(
            *(
                "ostree",
                f"--repo={repository}",
                "pull-local",
                f"--remote={REMOTE}",
                "--disable-fsync",
            ),
            *(self.repository, BRANCH),
        )
        shown(*admin, "deploy", f"--os={STATEROOT}", "--karg=console=tty0", f"{REMOTE}:{BRANCH}")
        return {
            "loader": LOADER,
            "seed_at": "/run/seed",
            "binds": (
                # The initramfs' marks, since nspawn's /run is new: it did boot a deployment, and
                # mounted /var as well.
                "/dev/null:/run/ostree-booted",
                "/dev/null:/run/ostree/initramfs-mount-var",
                f"{self.repository}:{UPDATES}",
            ),
        }

    def _ostree(self, *arguments: str | Path) -> str:
        return shown("ostree", f"--repo={self.repository}", *arguments)
