"""The examples work once their placeholder is replaced; the reference page follows the schema.

Run as a program it rewrites the tables of docs/configuration.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from firstboot.protocol.errors import UserError
from firstboot.userdata import make_token, parse
from firstboot.userdata.reading import read
from firstboot.userdata.rules import check, schema

TOP = Path(__file__).parents[1]
PAGE = TOP / "docs" / "configuration.md"
BEGIN, END = "<!-- begin tables -->\n", "<!-- end tables -->"
EXAMPLES = sorted(path for path in (TOP / "cloud-config").iterdir() if path.suffix != ".md")
PROVIDERS = schema()["properties"]["discovery"]["items"]
PLACEHOLDER = b"fb1-REPLACE-ME"


def rows(rule: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """A table row for each key of a mapping, and for those below it."""
    for key, part in rule["properties"].items():
        default = part.get("default", "")
        shown = f"`{json.dumps(default).strip(chr(34))}`" if default not in ("", []) else ""
        shown = "**required**" if key in rule.get("required", ()) else shown
        cells: tuple[str, ...] = (f"`{prefix}{key}`", part["x-must"], shown, part["description"])
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
        if "properties" in part:
            yield from rows(part, f"{prefix}{key}.")


def tables() -> str:
    """The reference: every key, the providers' options, and the keys of a match."""
    head = "| Key | Must be | Default | Meaning |\n|---|---|---|---|\n"
    match = schema()["definitions"]["match"]
    used = "`election.prefer`, `election.never` and `origin.node_labels`"
    between = f"\nA match, as in {used}. {match['description']}"
    providers = "\nProviders of `discovery`, each `{NAME: OPTIONS}` in its list.\n\n"
    return (
        head
        + "".join(rows(schema()))
        + providers
        + head
        + "".join(rows(PROVIDERS))
        + between
        + "\n\n"
        + head
        + "".join(rows(match))
    )


def page(text: str) -> str:
    """The page with its tables made anew."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{tables()}\n{END}{rest.partition(END)[2]}"


def test_page_is_up_to_date() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert BEGIN in text
    assert text == page(text), "run: python -m tests.test_examples"


def test_there_are_examples() -> None:
    names = {path.name for path in EXAMPLES}
    assert names == {
        "anywhere.yaml",
        "ignition.bu",
        "ignition.json",
        "origin.yaml",
        "static-addresses.yaml",
        "three-hosts.yaml",
        "three-masters.yaml",
        "top-level-key.yaml",
    }


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_is_accepted_with_a_token(path: Path) -> None:
    data = path.read_bytes()
    assert data.count(PLACEHOLDER) == 1
    token = make_token()
    document = parse(data.replace(PLACEHOLDER, token.encode()), path.name)
    assert document.token.reveal() == token
    assert document.config.cluster == "demo"
    assert document.warnings == ()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_is_refused_as_it_stands(path: Path) -> None:
    with pytest.raises(UserError) as caught:
        parse(path.read_bytes(), path.name)
    assert caught.value.message == "the token is a placeholder"
    assert caught.value.hint == "make one with: firstboot token"
    assert caught.value.where.startswith(path.name)


def test_ignition_json_is_what_the_butane_source_says() -> None:
    token = make_token().encode()
    documents = [
        parse((TOP / "cloud-config" / name).read_bytes().replace(PLACEHOLDER, token), "same")
        for name in ("ignition.bu", "ignition.json")
    ]
    assert documents[0] == documents[1]


def test_page_example_names_real_keys() -> None:
    """The page's first example is a valid document but for its token."""
    block = PAGE.read_text(encoding="utf-8").partition("```yaml\n")[2].partition("```")[0]
    said = read(block, "page")
    assert said is not None
    check(said)


def documented(rule: dict[str, Any], place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield place, rule
    for key, part in rule.get("properties", {}).items():
        yield from documented(part, f"{place}.{key}")


@pytest.mark.parametrize(
    "place, rule",
    [
        *documented(schema()),
        *documented(PROVIDERS, "discovery"),
        *documented(schema()["definitions"]["match"], "match"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_rule_has_words_and_its_examples_fit(place: str, rule: dict[str, Any]) -> None:
    import fastjsonschema

    assert rule["description"] and rule["x-must"]
    if not place:
        return
    assert rule["examples"]
    fits = fastjsonschema.compile({key: rule[key] for key in rule if key != "x-must"})
    for example in rule["examples"]:
        # A collection's or a quoted example is written as YAML; it must mean what the rule asks.
        is_yaml = isinstance(example, str) and example[0] in '[{"'
        fits(yaml.safe_load(example) if is_yaml else example)
    if "default" in rule:
        fits(rule["default"])


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
