"""This machine: its facts, its addresses, and the files that must survive a power cut.

Files are found under an explicit `root`; addresses are those of the network namespace the
process runs in.
"""

from firstboot.host.address import (
    Address,
    Interface,
    Network,
    choose,
    is_stopgap,
    survey,
    wait_for_address,
)
from firstboot.host.durable import (
    StorageFailed,
    make_directory,
    remove_durably,
    write_atomically,
    write_durably,
)
from firstboot.host.facts import Facts, facts, node_name
from firstboot.host.files import (
    give_back_resolver,
    holds_anything,
    make_link,
    make_parent,
    remove_block,
    remove_link,
    remove_tree,
    use_directory,
    use_resolver,
    write_block,
)
from firstboot.host.logins import tell_logins
from firstboot.host.machine import Machine, forget_machine_id, look, with_cloud
from firstboot.host.ports import taken
from firstboot.host.state import LostState, StateDirectory
from firstboot.host.status import read_status, write_status

__all__ = [
    "Address",
    "Facts",
    "Interface",
    "LostState",
    "Machine",
    "Network",
    "StateDirectory",
    "StorageFailed",
    "choose",
    "facts",
    "forget_machine_id",
    "give_back_resolver",
    "holds_anything",
    "is_stopgap",
    "look",
    "make_directory",
    "make_link",
    "make_parent",
    "node_name",
    "read_status",
    "remove_block",
    "remove_durably",
    "remove_link",
    "remove_tree",
    "survey",
    "taken",
    "tell_logins",
    "use_directory",
    "use_resolver",
    "wait_for_address",
    "with_cloud",
    "write_atomically",
    "write_block",
    "write_durably",
    "write_status",
]
