"""What the doubles of clouds are told: which instances there are, and what else is so."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Instance:
    """One machine of the cloud, known by the address its requests come from.

    Those with the same `launch` were made by one launch call, in the order they are listed.
    `group` is its Auto Scaling group or server group. `second` is an address on another interface.
    """

    address: str
    ipv6: str = ""
    tags: dict[str, str] = field(default_factory=dict)
    launch: int = 0
    group: str = ""
    state: str = "running"
    second: str = ""


@dataclass
class Cloud:
    """The double's settings; each can be changed while it runs.

    `metadata` and `api` are where it listens, ``ADDRESS:PORT``. With `tls`, a directory, the API
    is HTTPS with a certificate for its address and `names`, of the authority ``ca.pem`` there.
    `hop_limit` is the IP TTL of token answers, `tokens` may be ``optional`` for clients that know
    version 1 of the metadata service only (cloud-init outside of AWS). `granted` are the actions of
    the instances' role, `page` is the most a page may hold. `faults` maps a part (``metadata``,
    ``api``, ``identity``) to what is wrong with it, see `serving.py`. `services` are the types in
    Keystone's catalogue, `elsewhere` further regions it has them in, and `rules` the paths an
    application credential may get; None is no limit. `user_data` is what cloud-init finds, the
    same for every instance.
    """

    cloud: str
    instances: tuple[Instance, ...] = ()
    metadata: str = "127.0.0.1:0"
    api: str = "127.0.0.1:0"
    tls: str = ""
    names: tuple[str, ...] = ()
    region: str = "eu-west-1"
    role: str = "node"
    granted: tuple[str, ...] = ("ec2:DescribeInstances",)
    hop_limit: int = 1
    tokens: str = "required"
    metadata_tags: bool = True
    token_seconds: float = 3600.0
    page: int = 1000
    faults: dict[str, str] = field(default_factory=dict)
    services: tuple[str, ...] = ("compute",)
    elsewhere: tuple[str, ...] = ()
    rules: tuple[str, ...] | None = None
    user_data: str = ""
    credential: tuple[str, str] = ("firstboot-credential", "firstboot-secret")

    def change(self, **new: Any) -> None:
        """Set some of it anew, from JSON."""
        for key, value in new.items():
            if not hasattr(self, key):
                raise ValueError(f"the double knows no {key}")
            if key == "instances":
                value = tuple(i if isinstance(i, Instance) else Instance(**i) for i in value)
            setattr(self, key, tuple(value) if isinstance(value, list) else value)

    def who(self, address: str) -> int | None:
        """The number of the instance that asks from there; None if it is none."""
        for number, instance in enumerate(self.instances):
            if address in (instance.address, instance.ipv6, instance.second):
                return number
        return None

    def launch_index(self, number: int) -> int:
        """Its number within its launch call."""
        launch = self.instances[number].launch
        return sum(i.launch == launch for i in self.instances[:number])


def digits(*words: object, length: int) -> str:
    """Hexadecimal digits that follow from the words: the double's made-up ids."""
    return hashlib.sha256(repr(words).encode()).hexdigest()[:length]
