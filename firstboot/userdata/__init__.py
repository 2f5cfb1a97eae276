"""The one document every host reads: found, merged, checked strictly, made into a Document.

token     the shared secret and what a good one looks like
reading   bytes to plain values, each with the position it was said at (the only user of yaml)
rules     the shipped JSON Schema and errors in words (the only user of fastjsonschema)
document  the meaning: defaults, addresses, what must agree
places    where a host's configuration may lie, and why it has none
kernel    what the kernel's command line says of it; ``fetch`` gets it, and is not imported here
traces    copies of the token that user-data leaves on a host
carried   a document inside a cloud-config or an Ignition configuration, for ``validate``

Importing this loads neither yaml nor fastjsonschema; the first use does.
"""

from firstboot.userdata.carried import parse
from firstboot.userdata.document import Document, ProviderSpec, seconds
from firstboot.userdata.kernel import FETCHED, Source, named
from firstboot.userdata.places import CONFIG, JOIN, explain, find, read_file, settings, written
from firstboot.userdata.reading import dump
from firstboot.userdata.token import ONE_TIME, Secret, check_token, is_one_time, make_token

__all__ = [
    "CONFIG",
    "FETCHED",
    "JOIN",
    "ONE_TIME",
    "Document",
    "ProviderSpec",
    "Secret",
    "Source",
    "check_token",
    "dump",
    "explain",
    "find",
    "is_one_time",
    "make_token",
    "named",
    "parse",
    "read_file",
    "seconds",
    "settings",
    "written",
]
