"""What this machine looks like from the inside: its ids, and what the cloud says about it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from firstboot.host.durable import remove_durably, write_durably
from firstboot.protocol.record import dataclass

MAX_FACT = 4096
MAX_INSTANCE_DATA = 4 * 1024 * 1024
_MACHINE_ID = re.compile(r"[0-9a-f]{32}\Z")
DMI = ("product_serial", "product_uuid", "product_name", "sys_vendor", "chassis_asset_tag")
# What the firmware of each cloud's machines says of itself.
CLOUDS = {
    "ec2": {("sys_vendor", "Amazon EC2"), ("chassis_asset_tag", "Amazon EC2")},
    "openstack": {
        ("product_name", "OpenStack Nova"),
        ("product_name", "OpenStack Compute"),
        ("sys_vendor", "OpenStack Foundation"),
        ("chassis_asset_tag", "OpenTelekomCloud"),
        ("chassis_asset_tag", "HUAWEICLOUD"),
        ("chassis_asset_tag", "SAP CCloud VM"),
        ("chassis_asset_tag", "Samsung Cloud Platform"),
    },
}
_LAUNCH_INDEX_KEYS = ("launch_index", "ami_launch_index")


@dataclass(frozen=True, slots=True)
class Machine:
    """Ids of a machine; empty where there is none.

    ``machine_id`` is /etc/machine-id (machine-id(5)), ``dmi_uuid`` the firmware's system UUID,
    ``instance_id`` what cloud-init found. ``launch_index`` is the number of this host within one
    launch call of the cloud, None if unknown.
    """

    machine_id: str = ""
    dmi_uuid: str = ""
    instance_id: str = ""
    launch_index: int | None = None


def look(root: Path) -> Machine:
    """The machine whose file system is at `root`; what cannot be read is left empty."""
    machine_id = read_fact(root / "etc/machine-id")
    data = _instance_data(root)
    return Machine(
        # systemd writes "uninitialized" there before the first boot has given it one
        machine_id=machine_id if _MACHINE_ID.match(machine_id) else "",
        dmi_uuid=_dmi_uuid(root),
        instance_id=_instance_id(data),
        launch_index=_launch_index(data),
    )


def forget_machine_id(root: Path) -> None:
    """Have the next boot make a new machine-id, as on a first boot (machine-id(5))."""
    write_durably(root / "etc/machine-id", b"uninitialized\n", 0o444)
    second = root / "var/lib/dbus/machine-id"
    if second.exists() and not second.is_symlink():
        remove_durably(second)  # dbus makes it anew from the other


def read_fact(path: Path) -> str:
    """The first line of a small file, or an empty string."""
    try:
        with path.open("rb") as file:
            lines = file.read(MAX_FACT).decode(errors="replace").splitlines()
    except OSError:
        return ""
    return lines[0].strip() if lines else ""


def firmware(root: Path) -> dict[str, str]:
    """What the firmware says of the machine, by the names below /sys/class/dmi/id."""
    found = {name: read_fact(root / "sys/class/dmi/id" / name)[:256] for name in DMI}
    return {name: text for name, text in found.items() if text}


def platform(root: Path, dmi: Mapping[str, str]) -> str:
    """The cloud this host is on, by what lies on it: ``ec2``, ``openstack``, or empty.

    cloud-init knows it best; without it, the firmware says so (as cloud-init's ds-identify reads
    it). Nothing is asked over the network: this is on the way of every start.
    """
    found = _below(_instance_data(root), "v1", "platform")
    if found in CLOUDS:
        return str(found)
    return next((cloud for cloud, signs in CLOUDS.items() if signs & set(dmi.items())), "")


def _dmi_uuid(root: Path) -> str:
    uuid = read_fact(root / "sys/class/dmi/id/product_uuid").lower()
    # Firmware without a UUID of its own has all bits clear or set (SMBIOS 3.6, section 7.2.1).
    return "" if set(uuid) <= set("0-") or set(uuid) <= set("f-") else uuid[:64]


def _instance_data(root: Path) -> dict[str, Any]:
    # The redacted file: ids and the launch index are not secret, and anyone may read it.
    try:
        with (root / "run/cloud-init/instance-data.json").open("rb") as file:
            data = json.loads(file.read(MAX_INSTANCE_DATA))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _below(data: Any, *names: str) -> Any:
    """The item at that path of mappings; ``-`` and ``_`` are the same in a name.

    cloud-init spells the keys of `v1` both ways and keeps the cloud's own spelling under `ds`.
    """
    for name in names:
        if not isinstance(data, dict):
            return None
        spelled = {str(key).replace("-", "_"): item for key, item in data.items()}
        data = spelled.get(name)
    return data


def _instance_id(data: dict[str, Any]) -> str:
    found = _below(data, "v1", "instance_id")
    return found[:256] if isinstance(found, str) else ""


def _launch_index(data: dict[str, Any]) -> int | None:
    for key in _LAUNCH_INDEX_KEYS:
        found = _below(data, "ds", "meta_data", key)
        # EC2 has it as text, OpenStack as a number.
        if isinstance(found, int | str) and re.fullmatch(r"[0-9]{1,6}", str(found)):
            return int(found)
    return None
