"""The pages a stranger reads first, held against the code they describe."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from firstboot import cli

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "firstboot"
OVERLAY = ROOT / "ostree-overlay"
README = (ROOT / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("ostree-overlay/**/*.md"),
        *PACKAGE.rglob("*.md"),
    ]
)
CODE = re.compile(r"[A-Z][A-Z_]{2,}\Z")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
INLINE = re.compile(r"`([^`]+)`")


def section(page: str, title: str) -> str:
    """The text below a heading of the second level, up to the next one."""
    found = page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    assert found, f"there is no section {title!r}"
    return found


def rows(text: str) -> Iterator[list[str]]:
    """The cells of every table row, without the head."""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and not set(line) <= set("|-"):
            yield cells


def names(kind: str) -> list[str]:
    """What the table of names that stay lists of one kind."""
    table = rows(section(README, "Names that stay"))
    found = [cells[1] for cells in table if cells[0] == kind]
    assert found, f"no names of kind {kind}"
    return found


def makefile() -> tuple[set[str], set[str]]:
    """The targets and the variables a caller may set."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert phony is not None
    return set(phony[1].split()), set(re.findall(r"^([A-Z_]+) \?=", text, re.MULTILINE))


def below(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The verbs of a parser; none if it is one verb's."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def verbs() -> dict[str, argparse.ArgumentParser]:
    """The verbs of the command line, as its parser knows them; `containers list` is one."""
    found: dict[str, argparse.ArgumentParser] = {}
    for name, parser in below(cli._parser()).items():
        inner = below(parser)
        found |= {f"{name} {verb}": p for verb, p in inner.items()} or {name: parser}
    assert found, "the parser has no verbs"
    return found


# ---------------------------------------------------------------- names that stay


def test_make_targets_are_those_of_the_makefile() -> None:
    targets, variables = makefile()
    listed = {INLINE.findall(cell)[0].removeprefix("make ") for cell in names("make")}
    assert listed == targets - {"help", "packages", "origin-image"}  # a list, and parts of others
    used = set(re.findall(r"`make ([a-z]+)|^    make ([a-z]+)", README, re.MULTILINE))
    assert {a or b for a, b in used} <= targets
    for block in re.findall(r"`([^`\n]*[A-Z]{3,}=[^`\n]*)`|^    (make .*)$", README, re.MULTILINE):
        assert set(re.findall(r"\b([A-Z]{3,})=", "".join(block))) <= variables


def test_verbs_and_options_are_those_of_the_command_line() -> None:
    known = verbs()
    table = section(README, "Names that stay")
    listed = {}
    for cells in rows(table):
        if cells[0] == "verb":
            words = INLINE.findall(cells[1])[0].split()
            name, rest = (words[1], words[2:])
            if name not in known:
                name, rest = f"{name} {rest[0]}", rest[1:]
            listed[name] = (set(rest), set(re.findall(r"--[a-z-]+", cells[2])))
    assert set(listed) == set(known)
    for verb, (arguments, options) in listed.items():
        shown = [
            a for a in known[verb]._actions if a.help != argparse.SUPPRESS and a.dest != "help"
        ]
        assert arguments == {str(a.metavar) for a in shown if not a.option_strings}
        assert options == {a.option_strings[-1] for a in shown if a.option_strings}
    for page in PAGES:
        used = re.findall(r"`firstboot ([a-z]+)", page.read_text(encoding="utf-8"))
        assert set(used) <= {*(name.split()[0] for name in known), "key"}, (
            page
        )  # cloud-init's `firstboot` key


def test_exit_codes_are_those_of_the_command_line() -> None:
    codes = {cli.OK, cli.FAILED, cli.WAITING, cli.USAGE, cli.CONFIGURATION}
    assert {int(code) for code in names("exit")} == codes
    assert {int(code) for code in re.findall(r"^  (\d+) ", cli.EXIT_CODES, re.MULTILINE)} == codes


def test_files_units_and_ports_are_those_of_the_sources() -> None:
    trees = (PACKAGE, ROOT / "units", OVERLAY)
    kept = [p for tree in trees for p in tree.rglob("*") if p.is_file()]
    text = "\n".join(p.read_text(encoding="utf-8") for p in kept if p.suffix not in (".pyc", ".md"))
    text += "".join(f"/{p.relative_to(OVERLAY)}\n" for p in OVERLAY.rglob("*"))
    for path in (p for cell in names("file") for p in INLINE.findall(cell)):
        if path == "/var/lib/firstboot/complete":
            path = "/complete"  # built from its directory
        assert path.strip("/") in text, path
    for unit in (u for cell in names("unit") for u in INLINE.findall(cell)):
        assert unit in text, unit
    for port in names("port"):
        assert re.search(rf"\b{port.split()[1]}\b", text), port


# ---------------------------------------------------------------- troubleshooting


def codes_in(source: str) -> set[str]:
    """Every problem code a source text can put into a status."""
    found: set[object] = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Name(id="Problem"), args=[ast.Constant(value), *_]):
                found.add(value)
            case ast.keyword(arg="code", value=ast.Constant(value)):
                found.add(value)
            case ast.Assign(targets=[ast.Attribute(attr="failure")], value=ast.Constant(value)):
                found.add(value)
            case ast.Dict():
                pairs = zip(node.keys, node.values, strict=True)
                found |= {
                    v.value
                    for k, v in pairs
                    if isinstance(k, ast.Constant) and k.value == "code"
                    if isinstance(v, ast.Constant)
                }
    return {code for code in found if isinstance(code, str) and CODE.match(code)}


def test_codes_are_found_wherever_they_are_given() -> None:
    source = (
        "found.append(Problem('ONE_WAY', text))\n"
        "end(text, code='OTHER')\n"
        "self.failure = 'THIRD'\n"
        "shown = {'code': 'LAST', 'text': 'NOT THIS'}\n"
        "raise UserError('x', code=78)\n"
    )
    assert codes_in(source) == {"ONE_WAY", "OTHER", "THIRD", "LAST"}


def test_every_problem_is_in_the_table_and_only_those() -> None:
    given: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        given |= codes_in(path.read_text(encoding="utf-8"))
    listed = [
        code
        for cells in rows(section(README, "When it does not come up"))
        for code in INLINE.findall(cells[0])
    ]
    assert len(listed) == len(set(listed))
    assert set(listed) == given


# ---------------------------------------------------------------- links and modules


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as the usual renderers make them."""
    titles = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith(("https://", "http://")):
            continue
        name, _, anchor = link.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists(), f"{link} leads nowhere"
        assert there == ROOT or ROOT in there.parents
        if anchor:
            assert anchor in anchors(there.read_text(encoding="utf-8")), link


def test_the_architecture_names_every_module_and_no_other() -> None:
    modules = {
        p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py") if p.name != "__init__.py"
    }
    listed = [
        INLINE.findall(cells[0])[0]
        for cells in rows(section(ARCHITECTURE, "Floors"))
        if cells[0] != "Module"
    ]
    assert len(listed) == len(set(listed))
    assert set(listed) == modules


def test_the_architecture_names_real_places() -> None:
    """`module.name` in its text, as in the table of states, exists."""
    for module, name in re.findall(r"`([a-z]+)\.([a-z_]+)`", section(ARCHITECTURE, "States")):
        source = (PACKAGE / "protocol" / f"{module}.py").read_text(encoding="utf-8")
        assert f"def {name}(" in source, f"{module}.{name}"
    for path in re.findall(r"`(tests/[\w/]+)`", ARCHITECTURE):
        assert (ROOT / path).exists(), path
