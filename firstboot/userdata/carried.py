"""A document on its own, or carried by a cloud-config, an Ignition or a Butane configuration.

For ``firstboot validate FILE``, which runs anywhere: it sees what a launch would be given.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from firstboot.protocol.errors import UserError
from firstboot.protocol.record import dataclass
from firstboot.userdata.document import Document, make
from firstboot.userdata.places import CONFIG, DROP_INS
from firstboot.userdata.reading import (
    MAX_BYTES,
    Node,
    Said,
    children,
    compose,
    read,
    said_by,
    text_of,
)

# A few bytes can stand for much: an alias repeats a file, gzip holds a thousand times its size.
MAX_FILES = 64  # of ours; the others are not even decoded
MAX_FIELDS = 64  # of one file's entry; cloud-init knows 8


def parse(data: bytes, name: str) -> Document:
    """The Document in these bytes, which came from `name`; UserError and nothing else.

    Where another configuration carries the document as a file, positions refer to the document
    inside, and its path stands in the error's `where`.
    """
    text = text_of(data, name)
    layers, warnings = _unwrapped(text, name)
    if not layers:
        hint = "write lines such as: cluster: demo"
        raise UserError("the document is empty", where=name, hint=hint)
    return make(layers, (name,), warnings)


@dataclass(frozen=True, slots=True)
class _Written:
    """A file that the carrying configuration writes."""

    path: str
    load: Callable[[], bytes | None]  # None: fetched from elsewhere, or not decodable
    mode: int
    late: bool = False

    @property
    def rank(self) -> int:
        """Its precedence among the places of a configuration, -1 if it is none."""
        folder, _, base = self.path[1:].rpartition("/")
        if self.path == f"/{CONFIG}":
            return 0
        is_drop_in = folder in DROP_INS and base.endswith(".yaml") and not base.startswith(".")
        return 1 + DROP_INS.index(folder) if is_drop_in else -1


def _unwrapped(text: str, name: str) -> tuple[list[Said], list[str]]:
    """The layers a text holds, lowest precedence first, and warnings."""
    if text.lstrip().startswith("{"):
        try:
            whole = json.loads(text)
        except (ValueError, RecursionError):
            whole = {}  # flow YAML, perhaps; the reader below will say
        if "ignition" in whole:
            return _from_files(_ignition_files(whole), name, [])
    root = compose(text, name)
    keys = children(root)
    if text.startswith("#cloud-config") or keys.keys() & {"firstboot", "write_files"}:
        said = said_by(keys.get("firstboot"), name)
        return _from_files(_cloud_files(keys.get("write_files")), name, [said] if said else [])
    if {"variant", "storage"} <= keys.keys():
        return _from_files(_butane_files(keys["storage"]), name, [])
    said = said_by(root, name)
    return [said] if said else [], []


def _from_files(
    files: list[_Written], name: str, layers: list[Said]
) -> tuple[list[Said], list[str]]:
    """The layers that written files make above those given, and warnings about the files."""
    warnings, left = [], MAX_BYTES
    ours = sorted((f for f in files if f.rank >= 0), key=lambda f: (f.rank, f.path))
    if len(ours) > MAX_FILES:
        raise UserError(f"this writes more than {MAX_FILES} files for firstboot", where=name)
    for file in ours:
        inner = f"{name}, {file.path} in it"
        data = file.load()
        if data is None:
            message = "the contents are not in this file or cannot be decoded"
            raise UserError(message, where=inner)
        text = text_of(data, inner)
        left -= len(data)
        if left < 0:
            raise UserError("the files for firstboot are together larger than 1 MB", where=name)
        said = read(text, inner)
        layers += [said] if said else []
        if said and "token" in said.data and file.mode & 0o044:
            warnings.append(f"{inner} will be readable by others: give it the mode 0600")
        if file.late:
            warnings.append(f"{inner} will be written after firstboot looks: remove defer")
    if not layers:
        hint = f"have it write /{CONFIG}"
        raise UserError("this holds no firstboot configuration", where=name, hint=hint)
    return layers, warnings


def _cloud_files(node: Node | None) -> list[_Written]:
    """cloud-init's write_files (its module cc_write_files; the default mode is 0644)."""
    files = []
    for item in _sequence(node):
        texts = _texts(item)
        encoding = texts.get("encoding", "").lower()
        content = _parts(item).get("content")
        base64 = "64" in encoding or (content is not None and content.tag.endswith(":binary"))
        load = partial(_decoded, texts.get("content"), base64=base64, gzip="gz" in encoding)
        late = texts.get("defer", "false").lower() in ("true", "yes", "on")
        mode = _octal(texts.get("permissions", ""))
        files.append(_Written(texts.get("path", ""), load, mode, late))
    return files


def _butane_files(storage: Node) -> list[_Written]:
    """Butane's storage.files with inline contents; it is what people write Ignition in."""
    files = []
    for item in _sequence(children(storage).get("files")):
        texts = _texts(item)
        load = partial(_decoded, _texts(_parts(item).get("contents")).get("inline"))
        files.append(_Written(texts.get("path", ""), load, _octal(texts.get("mode", ""))))
    return files


def _ignition_files(whole: dict[str, Any]) -> list[_Written]:
    """Ignition's storage.files, contents in a data: URL (RFC 2397); its default mode is 0644."""
    files = []
    for item in _items(_fields(whole.get("storage")).get("files")):
        file = _fields(item)
        contents = _fields(file.get("contents"))
        gzip = contents.get("compression") == "gzip"
        load = partial(_from_url, str(contents.get("source", "")), gzip=gzip)
        mode = file.get("mode")
        octal = mode if isinstance(mode, int) else 0o644
        files.append(_Written(str(file.get("path", "")), load, octal))
    return files


def _from_url(url: str, *, gzip: bool) -> bytes | None:
    """What a data: URL holds, None for any other."""
    from urllib.parse import unquote_to_bytes

    scheme, _, rest = url.partition(":")
    media, comma, body = rest.partition(",")
    if scheme != "data" or not comma:
        return None
    plain = unquote_to_bytes(body.encode("utf-8", "surrogatepass"))
    return _decoded(plain, base64=media.endswith(";base64"), gzip=gzip)


def _fields(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _sequence(node: Node | None) -> list[Node]:
    return node.value if node is not None and node.id == "sequence" else []


def _parts(node: Node | None) -> dict[str, Node]:
    """The children of one file's entry; none if it has more than such an entry can have."""
    small = node is not None and len(node.value) <= MAX_FIELDS
    return children(node) if small else {}


def _texts(node: Node | None) -> dict[str, str]:
    return {key: str(v.value) for key, v in _parts(node).items() if v.id == "scalar"}


def _octal(text: str) -> int:
    digits = re.fullmatch("(?:0o?)?([0-7]{1,4})", text)
    return int(digits[1], 8) if digits else 0o644


def _decoded(
    content: str | bytes | None, *, base64: bool = False, gzip: bool = False
) -> bytes | None:
    """Undo base64, then gzip, to `MAX_BYTES` + 1 at most; None if they do not fit."""
    import binascii
    import zlib

    # A quoted scalar or JSON may hold lone surrogates; text_of then refuses the bytes.
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    try:
        if data is not None and base64:
            data = binascii.a2b_base64(data)
        if data is not None and gzip:
            stream = zlib.decompressobj(wbits=31)  # 31: the gzip format (zlib.h)
            data = stream.decompress(data, MAX_BYTES + 1)
            return data if stream.eof or len(data) > MAX_BYTES else None
    except (ValueError, zlib.error):
        return None
    return data
