"""The metadata services of clouds, as seen from an instance.

EC2's wants a session token (IMDSv2): a PUT, and then its answer with every question. OpenStack's
has no tokens. Both are at an address of the link that is the same everywhere.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

from firstboot.discovery.cloud import Trouble, mapping
from firstboot.web import Answer, Unanswered, ask

ADDRESSES = ("http://169.254.169.254", "http://[fd00:ec2::254]")
SECONDS = 5.0  # it is on the link, and mostly answers within milliseconds
TRIES = 2  # for facts that are asked for once only
TOKEN_SECONDS = 21600  # the most there is
MAX_TEXT = 65536
ABSENT = "nothing answers at the metadata service's address, 169.254.169.254"
HOP_LIMIT = (
    "Behind a bridge or in a container: `aws ec2 modify-instance-metadata-options"
    " --http-put-response-hop-limit 2`; else let 169.254.169.254 port 80 through."
)
ENABLE = "`aws ec2 modify-instance-metadata-options --http-endpoint enabled`"
CLOUD_FACTS = ("ami-launch-index", "instance-id", "reservation-id")
ZONE, TAGS = "placement/availability-zone", "tags/instance"
MAX_TAGS = 50  # as many as an instance may have


class Ec2Metadata:
    """EC2's, version 2. Methods block, and raise Trouble."""

    def __init__(self, address: str = "") -> None:
        self._addresses = (address,) if address else ADDRESSES
        self._address = ""
        self._token = ""
        self._good_until = 0.0

    def get(self, path: str) -> str | None:
        """The text at ``/latest/PATH``; None if there is none."""
        for _ in range(2):
            answer = self._get(path)
            if answer.status != 401:
                break
            self._token = ""  # it was forgotten, or the clock has jumped
        if answer.status == 404:
            return None
        if answer.status != 200:
            raise Trouble(f"the metadata service answers {answer.status} for {path}", ENABLE)
        return answer.body[:MAX_TEXT].decode(errors="replace").strip()

    def _get(self, path: str) -> Answer:
        if not self._token or time.monotonic() > self._good_until:
            self._begin()
        headers = {"X-aws-ec2-metadata-token": self._token}
        try:
            return ask("GET", f"{self._address}/latest/{path}", headers, seconds=SECONDS)
        except Unanswered as error:
            raise Trouble(f"the metadata service: {error}") from None

    def _begin(self) -> None:
        """Get a token, from the first address at which somebody gives one."""
        trouble = Trouble(ABSENT, "This is no EC2 instance, or port 80 of that address is closed.")
        headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)}
        for address in self._addresses:
            try:
                answer = ask("PUT", f"{address}/latest/api/token", headers, seconds=SECONDS)
            except Unanswered as error:
                if error.connected:  # the answer's hop limit ends it on the way back
                    what = f"the metadata service gives no session token: {error}"
                    trouble = Trouble(what, HOP_LIMIT)
                continue
            token = answer.body[:1024].decode("ascii", errors="replace").strip()
            if answer.status == 200 and token.isprintable() and 0 < len(token) < 1024:
                self._address, self._token = address, token
                self._good_until = time.monotonic() + TOKEN_SECONDS / 2
                return
            trouble = _refused(answer.status)
        raise trouble


def _refused(status: int) -> Trouble:
    if status == 403:
        return Trouble("the metadata service is off (403)", ENABLE)
    what = f"what is at 169.254.169.254 gives no session token ({status}): not EC2's"
    return Trouble(what, "On OpenStack use the provider openstack.")


class OpenstackMetadata:
    """OpenStack's. Methods block, and raise Trouble."""

    def __init__(self, address: str = "") -> None:
        self._address = address or ADDRESSES[0]

    def get(self, path: str) -> bytes | None:
        """What is at ``/PATH``; None if there is nothing."""
        try:
            answer = ask("GET", f"{self._address}/{path}", {}, seconds=SECONDS)
        except Unanswered as error:
            why = f"the metadata service: {error}" if error.connected else ABSENT
            raise Trouble(why) from None
        return answer.body if answer.status == 200 else None


def instance_data(platform: str, address: str = "") -> dict[str, Any]:
    """What cloud-init would have left in instance-data.json, as far as hosts are matched by it.

    For images without cloud-init. `platform` is ``ec2`` or ``openstack``. Blocks; raises Trouble.
    """
    read = _ec2_data if platform == "ec2" else _openstack_data
    for _ in range(TRIES - 1):
        with suppress(Trouble):
            return read(address)
    return read(address)


def _ec2_data(address: str) -> dict[str, Any]:
    service = Ec2Metadata(address)
    found: dict[str, Any] = {key: service.get(f"meta-data/{key}") for key in CLOUD_FACTS}
    zone = service.get(f"meta-data/{ZONE}")
    names = (service.get(f"meta-data/{TAGS}") or "").splitlines()[:MAX_TAGS]
    found["tags"] = {"instance": {key: service.get(f"meta-data/{TAGS}/{key}") for key in names}}
    v1 = {"instance_id": found["instance-id"], "availability_zone": zone}
    return {"v1": v1, "ds": {"meta-data": found}}


def _openstack_data(address: str) -> dict[str, Any]:
    service = OpenstackMetadata(address)
    found = mapping(service.get("openstack/latest/meta_data.json") or b"{}", "the metadata service")
    reservation = service.get("latest/meta-data/reservation-id") or b""
    v1 = {"instance_id": found.get("uuid"), "availability_zone": found.get("availability_zone")}
    amazon = {"reservation-id": reservation[:256].decode(errors="replace").strip()}
    return {"v1": v1, "ds": {"meta_data": found, "ec2_metadata": amazon}}
