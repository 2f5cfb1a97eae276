"""Servers that hosts find each other by: dnsmasq, and Apache with WebDAV, at the switch."""

from __future__ import annotations

from pathlib import Path

from tests.network.hosts import Host
from tests.network.rig import Network
from tests.network.run import wait_until

# Debian's places, then Fedora's.
APACHE = (("apache2", "/usr/lib/apache2/modules"), ("httpd", "/usr/lib64/httpd/modules"))


def answers(network: Network, port: int) -> None:
    """Wait until something listens at the switch."""
    program = f"import socket; socket.create_connection(('{network.gateway}', {port}), 1)"

    def listens() -> bool:
        return network.run(1, "python3", "-c", program, check=False).returncode == 0

    wait_until(listens, 30, f"port {port} is open")


def dns_server(network: Network, directory: Path, *records: str) -> Path:
    """Start dnsmasq with these options; the resolv.conf that points at it."""
    network.serve(
        *("dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-hosts", "--no-resolv"),
        *("--user=root", "--pid-file=", f"--listen-address={network.gateway}", "--bind-interfaces"),
        *records,
    )
    answers(network, 53)
    conf = directory / "resolv.conf"
    conf.write_text(f"nameserver {network.gateway}\noptions timeout:1 attempts:2\n")
    return conf


def resolves_by(host: Host, conf: Path) -> None:
    """Let that host's process have this resolv.conf: a mount that nobody else sees."""
    mount = f'mount --bind {conf} /etc/resolv.conf && exec "$@"'
    host.wrapper = ("unshare", "--mount", "sh", "-c", mount, "sh")


def web_server(network: Network, directory: Path, port: int = 8080) -> Path:
    """Start Apache with WebDAV on an empty directory, which is returned."""
    binary, modules = next((b, m) for b, m in APACHE if Path(m).is_dir())
    files = directory / "files"
    for made in (directory, files):
        made.mkdir(exist_ok=True)
        made.chmod(0o777)
    for above in directory.parents:  # Apache's workers are nobody
        if above.stat().st_uid == 0 and str(above).startswith(("/tmp", "/var/tmp")):
            above.chmod(above.stat().st_mode | 0o011)
    names = ("mpm_event", "authz_core", "dav", "dav_fs")
    loads = "".join(f"LoadModule {n}_module {modules}/mod_{n}.so\n" for n in names)
    at = f"[{network.gateway}]" if ":" in network.gateway else network.gateway
    conf = directory / "conf"
    conf.write_text(
        f"{loads}ServerName rendezvous\nServerRoot {directory}\nPidFile {directory}/pid\n"
        f"ErrorLog {directory}/error\nDavLockDB {directory}/lock\nUser nobody\n"
        f"Listen {at}:{port}\nDocumentRoot {files}\n"
        f"<Directory {files}>\nDav On\n</Directory>\n"
    )
    network.serve(binary, "-D", "FOREGROUND", "-f", conf)
    answers(network, port)
    return files
