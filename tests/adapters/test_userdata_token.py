"""The token: strong, told from its typing mistakes, and never shown."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import yaml

from firstboot.protocol.errors import UserError
from firstboot.userdata import ONE_TIME, Secret, check_token, is_one_time, make_token, parse
from firstboot.userdata.token import ALPHABET, assemble

TOKEN = assemble("7q0hzk3n5x9wbfcyd2rt8gjm4v6sape1")
BASE = f"cluster: demo\ntoken: {TOKEN}\nexpect: 3\n"


def mistake(text: str | bytes) -> str:
    """The one line a document's mistake makes."""
    with pytest.raises(UserError) as caught:
        parse(text.encode() if isinstance(text, str) else text, "c.yaml")
    line = str(caught.value)
    assert "\n" not in line
    assert TOKEN not in line
    return line


HINT = "; make one with: firstboot token"


def test_made_tokens_are_accepted_and_differ() -> None:
    tokens = {make_token() for _ in range(100)}
    assert len(tokens) == 100
    for token in tokens:
        check_token(token)


def test_token_has_160_random_bits() -> None:
    assert len(set(ALPHABET)) == 32
    assert len(make_token().removeprefix("fb1-").replace("-", "")) == 32 + 4


@pytest.mark.parametrize(
    "token, complaint",
    [
        ("fb1-…", "is a placeholder"),
        ("fb1-...", "is a placeholder"),
        ("changeme", "is a placeholder"),
        ("TOKEN", "is a placeholder"),
        ("<your token>", "is a placeholder"),
        ("fb1-REPLACE-ME", "is a placeholder"),
        ("''", "is a placeholder"),
        ("hunter2", "does not start with fb1-"),
        (TOKEN.upper(), "does not start with fb1-"),
        ("fb1-7q0hzk", "is too short: it is weak or was cut off"),
        (TOKEN[:-1], "is too short: it is weak or was cut off"),
        (assemble("a" * 32), "is a repeated pattern"),
        (assemble("0123456789abcdef" * 2), "is a repeated pattern"),
        (assemble(("0123456789abc" * 3)[:32]), "is a repeated pattern"),
        (assemble("abcdefgabcdegfacbdefgabdcefgabcd"), "is a repeated pattern"),
        (TOKEN + "0", "was mistyped: its checksum does not fit"),
        (TOKEN.replace("-", ""), "does not start with fb1-"),
        (TOKEN[:10] + TOKEN[11:17] + "-" + TOKEN[17:], "was mistyped: its checksum does not fit"),
        (TOKEN[:-1] + "é", "was mistyped: its checksum does not fit"),
    ],
)
def test_bad_token(token: str, complaint: str) -> None:
    line = mistake(BASE.replace(TOKEN, token))
    assert line == f"c.yaml:2:8: the token {complaint}{HINT}"


@pytest.mark.parametrize("token", ["12345678901234567890", "5", "[a]", "{a: b}", "null", "true"])
def test_token_that_is_no_text(token: str) -> None:
    line = mistake(BASE.replace(TOKEN, token))
    if token == "12345678901234567890":  # too long for a number here, so a text
        assert line == f"c.yaml:2:8: the token does not start with fb1-{HINT}"
    else:
        assert line == f"c.yaml:2:8: the token is not a text{HINT}"


def test_every_single_typing_mistake_is_caught() -> None:
    for i in range(4, len(TOKEN)):
        for wrong in ALPHABET:
            if wrong != TOKEN[i]:
                with pytest.raises(UserError):
                    check_token(TOKEN[:i] + wrong + TOKEN[i + 1 :])


def test_a_one_time_token_says_so_and_cannot_be_taken_for_the_other_kind() -> None:
    token = make_token(ONE_TIME)
    check_token(token)
    assert token.startswith("fb1j-")
    assert is_one_time(token)
    assert not is_one_time(TOKEN)
    assert parse(BASE.replace(TOKEN, token).encode(), "c.yaml").late
    assert not parse(BASE.encode(), "c.yaml").late
    for wrong in (token.replace("fb1j", "fb1"), TOKEN.replace("fb1", "fb1j"), f"fb1j{token}"):
        with pytest.raises(UserError):
            check_token(wrong)
    line = mistake(BASE.replace("demo", token))
    assert line.endswith(": a token stands here, where it would be shown")
    assert token not in line


def test_swapped_neighbours_are_caught() -> None:
    for i in range(4, len(TOKEN) - 1):
        swapped = TOKEN[:i] + TOKEN[i + 1] + TOKEN[i] + TOKEN[i + 2 :]
        with pytest.raises(UserError):
            check_token(swapped)


def test_secret_shows_nothing() -> None:
    secret = Secret(TOKEN)
    for shown in (repr(secret), str(secret), f"{secret}", f"{secret:>5}", f"{secret!r}"):
        assert shown.strip() == "***"
    assert secret.reveal() == TOKEN
    assert secret == Secret(TOKEN) != Secret(TOKEN + "x")
    assert copy.deepcopy(secret) == secret
    assert TOKEN not in repr(parse(BASE.encode(), "c.yaml"))


@pytest.mark.parametrize("libyaml", [True, False])
@pytest.mark.parametrize(
    "text",
    [
        f"cluster: {TOKEN}\nexpect: 3\n",
        f"cluster: demo\n{TOKEN}: yes\nexpect: 3\n",
        f"cluster: demo\ntokn: {TOKEN}\n",
        f"token {TOKEN}\n",
        f"token: {TOKEN}: x\n",
        f"token: *{TOKEN}\n",
        f"token: &{TOKEN} a\nb: &{TOKEN} c\n",
        f"token: !{TOKEN} a\n",
        f"token: '{TOKEN}\n",
        f"{TOKEN}: 1\n{TOKEN}: 2\n",
        f"{BASE}payload: {TOKEN}\n",
        f"{BASE}discovery: [{TOKEN}]\n",
        f"{BASE}discovery: [{{{TOKEN}: a}}]\n",
        f"{BASE}discovery: [{{static: [{TOKEN}]}}]\n",
        f"{BASE}network: {{cidr: {TOKEN}}}\n",
        f"{BASE}election: {{{TOKEN}: 1, never: [{{mac: {TOKEN}}}]}}\n",
    ],
)
def test_misplaced_token_is_not_shown(
    text: str, libyaml: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not libyaml:  # its sentences quote more of the document
        monkeypatch.delattr(yaml, "CBaseLoader")
    assert "fb1" not in mistake(text)


@pytest.mark.parametrize("name", ["cluster", "formation", "election.never[0].hostname"])
def test_token_as_a_name_would_be_published(name: str) -> None:
    other = make_token()
    said: dict[str, Any] = {"cluster": "demo", "token": TOKEN, "expect": 3}
    said |= {"election": {"never": [{"hostname": other}]}} if "." in name else {name: other}
    line = mistake(json.dumps(said))
    assert line.endswith(": a token stands here, where it would be shown")
    assert other not in line
