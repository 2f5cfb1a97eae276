"""What this machine looks like from the inside: its ids, and what the cloud says about it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import field, replace
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
# Where EC2's metadata and OpenStack's have them, as cloud-init keeps both.
_RESERVATION = (("ds", "meta_data", "reservation_id"), ("ds", "ec2_metadata", "reservation_id"))
_TAGS = (("ds", "meta_data", "tags", "instance"), ("ds", "meta_data", "meta"))
MAX_TAGS = 128


@dataclass(frozen=True, slots=True)
class Machine:
    """Ids of a machine; empty where there is none.

    ``machine_id`` is /etc/machine-id (machine-id(5)), ``dmi_uuid`` the firmware's system UUID,
    ``instance_id`` what cloud-init found. ``launch_index`` is the number of this host within one
    launch call of the cloud, None if unknown; ``reservation`` that call's id. ``zone`` is the
    availability zone, ``tags`` the instance's tags or metadata. All of these come from the cloud:
    hints and labels, never an authority.
    """

    machine_id: str = ""
    dmi_uuid: str = ""
    instance_id: str = ""
    launch_index: int | None = None
    reservation: str = ""
    zone: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)


def look(root: Path) -> Machine:
    """The machine whose file system is at `root`; what cannot be read is left empty."""
    machine_id = read_fact(root / "etc/machine-id")
    bare = Machine(
        # systemd writes "uninitialized" there before the first boot has given it one
        machine_id=machine_id if _MACHINE_ID.match(machine_id) else "",
        dmi_uuid=_dmi_uuid(root),
    )
    return with_cloud(bare, _instance_data(root))


def with_cloud(machine: Machine, data: Mapping[str, Any]) -> Machine:
    """The machine with what cloud-init's instance-data.json, or data of its form, says of it."""
    return replace(
        machine,
        instance_id=_text(data, "v1", "instance_id"),
        launch_index=_launch_index(data),
        reservation=_first(data, _RESERVATION),
        zone=_text(data, "v1", "availability_zone"),
        tags=_tags(data),
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


def _text(data: Mapping[str, Any], *names: str) -> str:
    found = _below(data, *names)
    return found[:256] if isinstance(found, str) else ""


def _first(data: Mapping[str, Any], places: Iterable[tuple[str, ...]]) -> str:
    return next(filter(None, (_text(data, *place) for place in places)), "")


def _tags(data: Mapping[str, Any]) -> dict[str, str]:
    """EC2's tags, if the instance's metadata has them; OpenStack's metadata of the server."""
    for place in _TAGS:
        found = _below(data, *place)
        if isinstance(found, dict):
            rows = [(k, v) for k, v in found.items() if isinstance(k, str) and isinstance(v, str)]
            return {key[:256]: value[:256] for key, value in rows[:MAX_TAGS]}
    return {}


def _launch_index(data: Mapping[str, Any]) -> int | None:
    for key in _LAUNCH_INDEX_KEYS:
        found = _below(data, "ds", "meta_data", key)
        # EC2 has it as text, OpenStack as a number.
        if isinstance(found, int | str) and re.fullmatch(r"[0-9]{1,6}", str(found)):
            return int(found)
    return None
