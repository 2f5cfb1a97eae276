"""A double of a cloud as a program of its own: ``python -m tests.clouds < settings``.

The first line of its input is a JSON object of `tests.clouds.instances.Cloud`'s settings. It
answers with a line of JSON when it serves: where, and where the authority's certificate is. Each
further line changes settings (``{"faults": {"api": "throttled"}}``) and is answered with what was
asked of the double so far. It ends with its input, so no double outlives its test.
"""

from __future__ import annotations

import json
import os
import sys

from tests.clouds.instances import Cloud
from tests.clouds.openstack import Openstack


def main() -> None:
    """Serve until the input ends."""
    settings = json.loads(sys.stdin.readline())
    cloud = Cloud(settings.pop("cloud"))
    cloud.change(**settings)
    if cloud.cloud == "ec2":
        from tests.clouds.amazon import Amazon

        double: Amazon | Openstack = Amazon(cloud)
    else:
        double = Openstack(cloud)
    authority = f"{cloud.tls}/ca.pem" if cloud.tls else ""
    print(json.dumps({**double.urls(), "authority": authority}), flush=True)
    for line in sys.stdin:
        instances, granted = cloud.instances, (cloud.granted, cloud.role)
        cloud.change(**json.loads(line))
        if instances != cloud.instances:
            double.build()
        elif granted != (cloud.granted, cloud.role):
            double.grant()
        print(json.dumps(double.calls()), flush=True)
    os._exit(0)  # moto would take seconds to forget its instances


if __name__ == "__main__":
    main()
