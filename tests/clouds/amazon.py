"""A double of EC2: the instance metadata service, version 2 only, and the API.

The API is moto's. With its IAM checks on, it verifies every request's signature (SigV4) against
the credentials of the instances' role, and that the role's policy grants the action. Before it
stands what moto lacks: stale requests are refused, and faults are shown on demand.

Metadata: a token must be had by PUT, with the lifetime asked for; without one, or after its time,
everything is 401, unless `tokens` are optional. The token's answer leaves with an IP TTL of
`hop_limit`, so that it does not get behind a router when that is 1. Requests that came through a
proxy are refused.
"""

from __future__ import annotations

import datetime
import io
import json
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterable
from typing import Any

from moto import settings
from moto.ec2.models import ec2_backends
from moto.ec2.utils import filter_dict_attribute_mapping
from moto.iam.models import iam_backends
from moto.moto_api._internal.models import moto_api_backend
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.sts.models import sts_backends

from tests.clouds.instances import Cloud, Instance
from tests.clouds.serving import Handler, Server, tls

ACCOUNT = "123456789012"
SKEW = 300.0  # seconds a request may be off, as AWS has it
TOKEN_PATH = "/latest/api/token"
TTL_HEADER = "X-aws-ec2-metadata-token-ttl-seconds"
TOKEN_HEADER = "X-aws-ec2-metadata-token"
MAX_TTL = 21600
VERSION = re.compile(r"latest|20[0-9]{2}-[0-9]{2}-[0-9]{2}")  # all serve the same here


class Amazon:
    """The double; it serves once it is made."""

    def __init__(self, cloud: Cloud) -> None:
        self.cloud = cloud
        self.rows: list[Any] = []  # moto's instances, as the cloud's
        self.vpc = self.subnet = ""
        self.tokens: dict[str, float] = {}  # and until when they are good
        filter_dict_attribute_mapping["reservation-id"] = "reservation_id"
        settings.INITIAL_NO_AUTH_ACTION_COUNT = 0
        self.build()
        names = (cloud.api.rpartition(":")[0], f"ec2.{cloud.region}.amazonaws.com", *cloud.names)
        self.metadata = Server(cloud.metadata, _handler(Metadata, self), None)
        self.api = Server(cloud.api, _handler(Api, self), tls(cloud.tls, names))
        self.application = DomainDispatcherApplication(create_backend_app)

    def urls(self) -> dict[str, str]:
        """Where to reach it."""
        return {"metadata": self.metadata.url, "api": self.api.url}

    def calls(self) -> dict[str, int]:
        """What was asked, and how often."""
        return dict(self.metadata.calls + self.api.calls)

    def build(self) -> None:
        """Have moto know exactly the cloud's instances and role."""
        cloud = self.cloud
        moto_api_backend.reset()
        self.assumed: dict[str, Any] = {}  # by the role's name
        backend = ec2_backends[ACCOUNT][cloud.region]
        vpc = backend.create_vpc("10.77.0.0/16")
        zone = f"{cloud.region}a"
        subnet = backend.create_subnet(vpc.id, "10.77.0.0/24", availability_zone=zone)
        self.vpc, self.subnet = vpc.id, subnet.id
        found: dict[int, Any] = {}
        for launch in dict.fromkeys(i.launch for i in cloud.instances):
            members = [n for n, i in enumerate(cloud.instances) if i.launch == launch]
            reservation = backend.run_instances(
                "ami-12c6146b",
                len(members),
                None,
                [],
                region_name=cloud.region,
                instance_type="t3.micro",
                is_instance_type_default=False,
                subnet_id=subnet.id,
                tags={},
                nics=[],
                private_ip=None,
            )
            found |= {
                number: (reservation.id, row)
                for number, row in zip(members, reservation.instances, strict=True)
            }
        for reservation, row in found.values():
            row.reservation_id = reservation  # for the filter that moto lacks
        self.rows = [found[n] for n in range(len(cloud.instances))]
        for instance, (_, row) in zip(cloud.instances, self.rows, strict=True):
            self._shape(instance, row)
        self.grant()

    def _shape(self, instance: Instance, row: Any) -> None:
        """moto chooses addresses itself, and gives a launch's instances the same tags."""
        group = {"aws:autoscaling:groupName": instance.group} if instance.group else {}
        if instance.tags or group:
            row.add_tags({**instance.tags, **group})
        row._state.name = instance.state
        row._state.code = {"pending": 0, "running": 16, "stopped": 80}[instance.state]
        backend = ec2_backends[ACCOUNT][self.cloud.region]
        _address(row.nics[0], instance.address, instance.ipv6)
        if instance.second:
            nic = backend.create_network_interface(self.subnet, "10.77.0.250")
            backend.attach_network_interface(nic.id, row.id, 1)
            _address(nic, instance.second, "")

    def grant(self) -> None:
        """The role, what it may do, and the credentials its instances hold: new for a new role."""
        iam, cloud = iam_backends[ACCOUNT]["aws"], self.cloud
        name = cloud.role or "none"
        if name not in self.assumed:
            role = iam.create_role(
                role_name=name,
                assume_role_policy_document="{}",
                path="/",
                permissions_boundary="",
                description="",
                tags=[],
                max_session_duration="3600",
            )
            self.assumed[name] = sts_backends[ACCOUNT]["aws"].assume_role(
                region_name=cloud.region,
                role_session_name=cloud.region,
                role_arn=role.arn,
                policy="",
                duration=3600,
                external_id="",
            )
        # A policy cannot be empty, so one of nothing denies everything.
        effect = {"Effect": "Allow", "Action": list(cloud.granted)}
        effect = effect if cloud.granted else {"Effect": "Deny", "Action": ["*"]}
        policy = {"Version": "2012-10-17", "Statement": [{**effect, "Resource": "*"}]}
        iam.put_role_policy(name, "granted", json.dumps(policy))

    def tree(self, number: int) -> dict[str, Any]:
        """The metadata of an instance."""
        cloud, instance = self.cloud, self.cloud.instances[number]
        reservation, row = self.rows[number]
        zone = f"{cloud.region}a"
        macs = {
            nic.mac_address: {
                "device-number": str(nic.device_index),
                "local-ipv4s": nic.private_ip_address,
                **({"ipv6s": nic.ipv6_addresses[0]} if nic.ipv6_addresses else {}),
                "subnet-id": self.subnet,
                "vpc-id": self.vpc,
            }
            for nic in row.nics.values()
        }
        document = {
            "accountId": ACCOUNT,
            "availabilityZone": zone,
            "instanceId": row.id,
            "privateIp": instance.address,
            "region": cloud.region,
        }
        data: dict[str, Any] = {
            "ami-launch-index": str(cloud.launch_index(number)),
            "hostname": row.private_dns_name,
            "instance-id": row.id,
            "local-ipv4": instance.address,
            "mac": row.nics[0].mac_address,
            "network": {"interfaces": {"macs": macs}},
            "placement": {"availability-zone": zone, "region": cloud.region},
            "reservation-id": reservation,
            "services": {"domain": "amazonaws.com", "partition": "aws"},
        }
        if cloud.role:
            data["iam"] = {"security-credentials": {cloud.role: self._credentials()}}
        tags = {**instance.tags}
        if tags and cloud.metadata_tags:
            data["tags"] = {"instance": tags}
        given = {"user-data": cloud.user_data} if cloud.user_data else {}
        return {
            **given,
            "meta-data": data,
            "dynamic": {"instance-identity": {"document": json.dumps(document)}},
        }

    def _credentials(self) -> str:
        end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)
        assumed = self.assumed[self.cloud.role]
        return json.dumps(
            {
                "Code": "Success",
                "Type": "AWS-HMAC",
                "AccessKeyId": assumed.access_key_id,
                "SecretAccessKey": assumed.secret_access_key,
                "Token": assumed.session_token,
                "Expiration": end.strftime("%Y-%m-%dT%H:%M:%SZ"),
            }
        )


def _address(nic: Any, address: str, ipv6: str) -> None:
    nic.private_ip_address = address
    nic.private_ip_addresses = [{"Primary": True, "PrivateIpAddress": address}]
    nic.ipv6_addresses = [ipv6] if ipv6 else []


def _handler(kind: type[Handler], double: Amazon) -> type[Handler]:
    return type(kind.__name__, (kind,), {"double": double})


class Metadata(Handler):
    """http://169.254.169.254 of an instance."""

    double: Amazon

    def do_PUT(self) -> None:
        """Give out a token."""
        cloud = self.double.cloud
        self.server.calls["token"] += 1
        # What goes out from here on has this many hops to live (ip(7)).
        self.connection.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, cloud.hop_limit)
        if self.fails(cloud.faults.get("metadata", "")):
            return
        wanted = self.headers.get(TTL_HEADER, "")
        if self.path != TOKEN_PATH:
            self.answer(405)
        elif self.headers.get("X-Forwarded-For"):
            self.answer(403)
        elif not wanted.isdecimal() or not 1 <= int(wanted) <= MAX_TTL:
            self.answer(400)
        else:
            token = secrets.token_urlsafe(40)
            self.double.tokens[token] = time.monotonic() + int(wanted)
            self.answer(200, token, **{TTL_HEADER: wanted})

    def do_GET(self) -> None:
        """A piece of metadata, or the names below it."""
        self.server.calls["metadata"] += 1
        double = self.double
        if self.fails(double.cloud.faults.get("metadata", "")):
            return
        token = self.headers.get(TOKEN_HEADER)
        free = token is None and double.cloud.tokens == "optional"
        if not free and double.tokens.get(token or "", 0.0) < time.monotonic():
            self.answer(401)
            return
        number = double.cloud.who(str(self.client_address[0]))
        parts = [part for part in self.path.split("/") if part]
        found: Any = double.tree(number) if number is not None else {}
        if not parts or not VERSION.fullmatch(parts.pop(0)):
            found = None
        for part in parts:
            found = found.get(part) if isinstance(found, dict) else None
        if found is None:
            self.answer(404)
        elif isinstance(found, dict):
            rows = [f"{key}/" if isinstance(item, dict) else key for key, item in found.items()]
            self.answer(200, "\n".join(rows))
        else:
            self.answer(200, found)


class Api(Handler):
    """https://ec2.REGION.amazonaws.com, before moto."""

    double: Amazon

    def do_POST(self) -> None:
        """A call of the Query API."""
        cloud, body = self.double.cloud, self.body()
        self.server.calls["api"] += 1
        if cloud.faults.get("api") == "throttled":
            self.error(503, "RequestLimitExceeded", "Request limit exceeded.")
        elif self.fails(cloud.faults.get("api", "")):
            return
        elif not self.headers.get("Authorization", "").startswith("AWS4-HMAC-SHA256 "):
            self.error(401, "AuthFailure", "The request is not signed.")
        elif abs(self._age()) > SKEW:
            self.error(400, "RequestExpired", "Request has expired.")
        else:
            self._moto(body)

    def error(self, status: int, code: str, message: str) -> None:
        """Answer as EC2 does when it refuses."""
        self.answer(
            status,
            '<?xml version="1.0" encoding="UTF-8"?>\n<Response><Errors><Error>'
            f"<Code>{code}</Code><Message>{message}</Message></Error></Errors>"
            "<RequestID>00000000-0000-0000-0000-000000000000</RequestID></Response>",
            Content_Type="text/xml;charset=UTF-8",
        )

    def _age(self) -> float:
        try:
            sent = datetime.datetime.strptime(self.headers["X-Amz-Date"], "%Y%m%dT%H%M%S%z")
        except (TypeError, ValueError):
            return SKEW + 1
        return (datetime.datetime.now(datetime.UTC) - sent).total_seconds()

    def _moto(self, body: bytes) -> None:
        """Hand it to moto, as a WSGI server would (PEP 3333)."""
        answered: list[tuple[str, list[tuple[str, str]]]] = []

        def start(
            status: str, headers: list[tuple[str, str]], _: Any = None
        ) -> Callable[..., None]:
            answered.append((status, headers))
            return lambda data: None

        host = self.headers.get("Host", "")
        environment: dict[str, Any] = {
            "REQUEST_METHOD": self.command,
            "SCRIPT_NAME": "",
            "PATH_INFO": self.path.partition("?")[0],
            "QUERY_STRING": self.path.partition("?")[2],
            "SERVER_NAME": host.partition(":")[0],
            "SERVER_PORT": host.partition(":")[2] or "443",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "CONTENT_LENGTH": str(len(body)),
            "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": self.server.scheme,
            "wsgi.input": io.BytesIO(body),
            "wsgi.errors": io.StringIO(),
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
        }
        for name, value in self.headers.items():
            environment.setdefault(f"HTTP_{name.upper().replace('-', '_')}", value)
        chunks: Iterable[bytes] = self.double.application(environment, start)
        data = b"".join(chunks)
        status, headers = answered[0]
        kind = dict(headers).get("Content-Type", "text/xml")
        self.answer(int(status.split()[0]), data, Content_Type=kind)
