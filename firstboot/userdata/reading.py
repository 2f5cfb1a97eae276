"""Bytes to plain values: strict, bounded, and each value with the position it was said at."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from firstboot.protocol.errors import UserError

MAX_BYTES = 1 << 20
MAX_DEPTH = 32  # the schema needs 6; a whole user-data has a few more
MAX_NODES = 50_000  # an alias counts each time it is used, so a bomb runs out early
EXPANDS = "the document's aliases expand to too much"
MAX_SHOWN = 24  # shorter than any token, so an error text cannot quote one
# What YAML does not call printable (YAML 1.2, section 5.1), as far as UTF-8 can hold it; U+FFFE
# and U+FFFF are left to yaml, they would make this pattern slow to compile.
NOT_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f]")
PLAIN_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map")
# YAML 1.2's core schema (section 10.3.2) without its octal, hexadecimal and floating numbers.
WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}
INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})\Z")

Place = tuple[str, ...]  # the keys and list indexes that lead to a value
Node = Any  # yaml.Node: yaml is imported late, and its stubs leave the nodes' attributes out


@dataclass
class Said:
    """Plain values, and for each place the positions of its key and of the value itself."""

    data: Any
    marks: dict[Place, tuple[str, str]]

    def where(self, place: Place, *, key: bool = False) -> str:
        """``file:line:column`` of `place`, or of the nearest place known above it."""
        while place and place not in self.marks:
            place = place[:-1]
        return self.marks.get(place, ("", ""))[0 if key else 1]

    def error(self, place: Place, message: str, hint: str = "") -> UserError:
        """A mistake in the value at `place`."""
        return UserError(message, where=self.where(place), hint=hint)


def texts(value: Any, place: Place = ()) -> Iterator[tuple[Place, str]]:
    """Every text in plain values, with its place; keys are not values."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, dict | list):
        below = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in below:
            yield from texts(item, (*place, str(key)))


def dump(plain: Any) -> str:
    """Plain data as YAML, texts of several lines as they stand."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    def text(dumper: Dumper, value: str) -> Node:
        style = "|" if "\n" in value else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, text)
    return str(yaml.dump(plain, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=1000))


def show(value: object) -> str:
    """A value as an error may show it: short texts only, and nothing like a token."""
    if isinstance(value, str):
        harmless = len(value) <= MAX_SHOWN and value.isprintable() and "fb1" not in value.lower()
        return repr(value) if harmless else "this text"
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    article = "a" if value else "an empty"
    return f"{article} {'list' if isinstance(value, list) else 'mapping'}"


def text_of(data: bytes, name: str) -> str:
    """Bytes as text. UserError: larger than `MAX_BYTES`, not UTF-8, control characters."""
    if len(data) > MAX_BYTES:
        raise UserError("the document is larger than 1 MB", where=name)
    kind = ""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        kind = "a byte that is not UTF-8"
        text = data[: error.start].decode("utf-8-sig", "replace")
    control = NOT_TEXT.search(text)
    if control:
        kind = "a control character"
        text = text[: control.start()]
    if kind:
        where = f"{name}:{text.count(chr(10)) + 1}:{len(text) - text.rfind(chr(10))}"
        raise UserError(f"the document is not text: it holds {kind}", where=where)
    return text


def compose(text: str, name: str) -> Node | None:
    """The YAML node graph, None for an empty document; length and depth are bounded first."""
    import yaml

    # The base loader guesses no types: YAML 1.1 would read a MAC address as a base-60 number.
    loader: Any = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
    depth = 0
    try:
        for count, event in enumerate(yaml.parse(text, Loader=loader)):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH or count > 2 * MAX_NODES:
                what = "too deeply nested" if depth > MAX_DEPTH else "too long"
                raise UserError(f"the document is {what}", where=_position(name, event.start_mark))
        return yaml.compose(text, Loader=loader)
    except yaml.MarkedYAMLError as error:
        # The problem may quote a word of the document, and so the token; the snippet always does.
        problem = re.sub(r"(['\"]).{4,}\1", "…", error.problem or "syntax error")
        where = _position(name, error.problem_mark or error.context_mark)
        raise UserError(f"this is not valid YAML: {problem}", where=where) from None
    except yaml.YAMLError:
        raise UserError("this is not valid YAML", where=name) from None


def children(node: Node | None) -> dict[str, Node]:
    """The value nodes of a mapping by key, the last of equal ones; {} for any other node."""
    if node is None or node.id != "mapping":
        return {}
    return {str(key.value): value for key, value in node.value if key.id == "scalar"}


def read(text: str, name: str, *, positions: bool = True) -> Said | None:
    """What one document says; None when it is empty. UserError when it is not a mapping."""
    return said_by(compose(text, name), name, positions=positions)


def said_by(node: Node | None, name: str, *, positions: bool = True) -> Said | None:
    """The same for a part of a document."""
    reader = _Reader(name, positions=positions)
    data = None if node is None else reader.value(node)
    if data is None or data == {}:
        return None
    said = Said(data, reader.marks)
    if not isinstance(data, dict):
        hint = "write lines such as: cluster: demo"
        raise said.error((), "the document is not a mapping of keys to values", hint)
    return said


def merged(layers: Sequence[Said]) -> Said:
    """Later layers win, mappings are merged, lists replaced; positions are the winner's."""

    def merge(base: Any, over: Any) -> Any:
        if not (isinstance(base, dict) and isinstance(over, dict)):
            return over
        both = {key: merge(base[key], over[key]) for key in base.keys() & over.keys()}
        return {**base, **over, **both}

    whole = Said({}, {})
    for layer in layers:
        whole = Said(merge(whole.data, layer.data), whole.marks | layer.marks)
    return whole


def _position(name: str, mark: Any) -> str:
    return f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name


class _Reader:
    """Turns one document's nodes into plain values and remembers where each was said."""

    def __init__(self, name: str, *, positions: bool) -> None:
        self.name = name
        self.positions = positions
        self.marks: dict[Place, tuple[str, str]] = {}
        self.left = MAX_NODES
        self.room = MAX_BYTES  # characters; what is said once fits, aliases repeat it

    def where(self, node: Node) -> str:
        return _position(self.name, node.start_mark if self.positions else None)

    def value(self, node: Node, place: Place = (), key: Node | None = None) -> Any:
        where = self.where(node)
        self.marks[place] = (self.where(key) if key else where, where)
        self.left -= 1
        if self.left < 0 or len(place) > MAX_DEPTH:
            raise UserError(EXPANDS, where=where)
        if node.tag not in PLAIN_TAGS:
            raise UserError("YAML tags such as !!binary are not used here", where=where)
        if node.id == "sequence":
            return [self.value(item, (*place, str(i))) for i, item in enumerate(node.value)]
        if node.id == "mapping":
            return self.mapping(node, place)
        text = self.text(node)
        if node.style:  # quoted, or a block
            return text
        return WORDS[text] if text in WORDS else int(text) if INTEGER.match(text) else text

    def mapping(self, node: Node, place: Place) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in node.value:
            if key.id != "scalar":
                raise UserError("a key must be a plain word", where=self.where(key))
            name = self.text(key)
            if name in found:
                hint = f"the first is at {self.marks[(*place, name)][0]}" if self.positions else ""
                message = f"the key {show(name)} is given twice"
                raise UserError(message, where=self.where(key), hint=hint)
            found[name] = self.value(value, (*place, name), key)
        return found

    def text(self, node: Node) -> str:
        text = str(node.value)
        self.room -= len(text)
        if self.room < 0:
            raise UserError(EXPANDS, where=self.where(node))
        # What cloud-init leaves in place of a variable it does not know (its instancedata page).
        if "CI_MISSING_JINJA_VAR" in text:
            message = "cloud-init did not know a jinja variable used here"
            hint = "see which there are with: cloud-init query --list-keys"
            raise UserError(message, where=self.where(node), hint=hint)
        return text
