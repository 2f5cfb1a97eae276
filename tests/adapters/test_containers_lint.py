"""`firstboot containers lint`: each rule finds what it is for, and nothing in a sound image."""

from __future__ import annotations

import copy
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from firstboot import cli
from firstboot.containers import ContainerError, lint_build
from firstboot.containers.lint import lint

CONFIG: dict[str, Any] = {
    "root": {"path": "rootfs", "readonly": True},
    "process": {"terminal": False, "args": ["run.sh", "$GREETING"]},
    "mounts": [{"type": "bind", "source": "${STATE_DIRECTORY}/$NAME", "destination": "/data"}],
}
UNIT = """[Unit]
Description=$NAME
[Service]
ExecStartPre=/bin/sh -c 'echo $$HOME'
ExecStart=$EXEC_START
ExecStop=$EXEC_STOP
WorkingDirectory=$DESTDIR
"""
DOCKERFILE = "\n".join(
    [
        "FROM scratch",
        "# COPY nothing /export",
        "LABEL atomic.type=system \\",
        *[f'      {name}="x" \\' for name in lint_build.LABELS],
        "      more=1",
        "RUN dnf --setopt=tsflags=nodocs install -y httpd",
        "COPY *.template manifest.json /exports/",
        "",
    ]
)


class Sources:
    """A directory with the sources of a sound image, to be spoiled."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir()
        self.config = copy.deepcopy(CONFIG)
        self.write("config.json.template", json.dumps(CONFIG))
        self.write("service.template", UNIT)
        self.write("tmpfiles.template", "d ${STATE_DIRECTORY}/$NAME 0700 - - - -\n")
        self.write("manifest.json", {"defaultValues": {"GREETING": "hello"}})
        self.write("Dockerfile", DOCKERFILE)
        self.git("init", "-q")
        self.commit()

    def write(self, name: str, content: Any) -> None:
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))

    def alter(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Spoil the template of config.json."""
        change(self.config)
        self.write("config.json.template", json.dumps(self.config))

    def edit(self, name: str, old: str, new: str) -> None:
        text = (self.directory / name).read_text()
        assert old in text
        self.write(name, text.replace(old, new))

    def git(self, *arguments: str) -> None:
        who = ("-c", "user.name=t", "-c", "user.email=t@example.com")
        subprocess.run(["git", "-C", str(self.directory), *who, *arguments], check=True)

    def commit(self) -> None:
        self.git("add", "-A")
        self.git("commit", "-q", "-m", "x", "--allow-empty")

    def found(self) -> set[tuple[str, bool]]:
        self.commit()
        return {(f.rule, f.error) for f in lint(self.directory)}


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    return Sources(tmp_path / "sources")


def test_a_sound_image_has_no_findings(sources: Sources) -> None:
    assert sources.found() == set()


def test_etcds_own_image_has_none() -> None:
    top = Path(__file__).parents[2] / "firstboot/payloads/etcd"
    assert [f for f in lint(top) if f.rule not in ("git-status", "not-in-git")] == []


Spoil = Callable[[Sources], object]
LABELLED = {"selinuxProcessLabel": "x"}
HOSTFS = {"defaultValues": {"GREETING": ""}}


def rename(sources: Sources, name: str) -> None:
    sources.write("hostfs/etc/x", "x")
    sources.write("manifest.json", {**HOSTFS, "renameFiles": {"/etc/x": name}})


SPOILED: dict[str, tuple[bool, Spoil]] = {
    "config-verbatim": (True, lambda s: s.write("config.json", json.dumps(CONFIG))),
    "mount-type": (True, lambda s: s.alter(lambda c: c["mounts"][0].update(type="rbind"))),
    "root-readonly": (True, lambda s: s.alter(lambda c: c["root"].update(readonly=False))),
    "terminal": (True, lambda s: s.alter(lambda c: c["process"].pop("terminal"))),
    "selinux-label": (
        True,
        lambda s: s.alter(lambda c: c.update(linux=LABELLED)),
    ),
    "json": (True, lambda s: s.edit("config.json.template", '"rootfs"', '"rootfs" "x"')),
    "placeholder": (True, lambda s: s.edit("service.template", "$$HOME", "$1")),
    "manifest": (True, lambda s: s.write("manifest.json", "{")),
    "rename-relative": (True, lambda s: rename(s, "etc/$NAME")),
    "root-path": (False, lambda s: s.alter(lambda c: c["root"].update(path="/"))),
    "fixed-directory": (
        False,
        lambda s: s.alter(lambda c: c["mounts"][0].update(source="/var/lib/web")),
    ),
    "source-not-made": (False, lambda s: s.write("tmpfiles.template", "d /srv/other\n")),
    "unit-variable": (False, lambda s: s.edit("service.template", "ExecStop=$EXEC_STOP\n", "")),
    "pid-file": (False, lambda s: s.write("service.template", UNIT + "PIDFile=$PIDFILE\n")),
    "start-pre": (
        False,
        lambda s: s.write(
            "service.template", UNIT + "ExecStopPost=$EXEC_STOPPOST\nPIDFile=$PIDFILE\n"
        ),
    ),
    "notify": (
        False,
        lambda s: s.edit("service.template", "[Service]\n", "[Service]\nType=notify\n"),
    ),
    "missing-file": (False, lambda s: (s.directory / "tmpfiles.template").unlink()),
    "no-default": (False, lambda s: s.write("service.template", UNIT + "# $UNKNOWN\n")),
    "dead-default": (
        False,
        lambda s: s.write("manifest.json", {"defaultValues": {"GREETING": "", "PIDFILE": "/x"}}),
    ),
    "rename-nothing": (
        False,
        lambda s: s.write("manifest.json", {**HOSTFS, "renameFiles": {"/etc/x": "/etc/y"}}),
    ),
    "template-nothing": (
        False,
        lambda s: s.write("manifest.json", {**HOSTFS, "installedFilesTemplate": ["/etc/x"]}),
    ),
    "hostfs-usr": (False, lambda s: s.write("hostfs/usr/bin/x", "x")),
    "maintainer": (False, lambda s: s.write("Dockerfile", DOCKERFILE + "MAINTAINER me\n")),
    "nodocs": (False, lambda s: s.edit("Dockerfile", "--setopt=tsflags=nodocs ", "")),
    "label": (False, lambda s: s.edit("Dockerfile", 'summary="x"', "")),
    "label-type": (False, lambda s: s.edit("Dockerfile", "atomic.type=system", "")),
    "export": (False, lambda s: s.write("Dockerfile", DOCKERFILE + "COPY x /export/\n")),
    "slash": (False, lambda s: s.write("Dockerfile", DOCKERFILE + "COPY x /exports\n")),
    "add": (False, lambda s: s.write("Dockerfile", DOCKERFILE + "ADD a.template /exports/\n")),
    "not-copied": (False, lambda s: s.edit("Dockerfile", " manifest.json", "")),
}


@pytest.mark.parametrize("rule", SPOILED)
def test_each_rule_finds_what_it_is_for(sources: Sources, rule: str) -> None:
    error, spoil = SPOILED[rule]
    spoil(sources)
    found = sources.found()
    assert (rule, error) in found
    # A manifest that cannot be read has no defaults either.
    others = {"no-default"} if rule == "manifest" else set()
    others |= {"source-not-made"} if rule in ("fixed-directory",) else set()
    assert {name for name, _ in found} - others == {rule}


def test_files_that_git_does_not_have(sources: Sources, tmp_path: Path) -> None:
    sources.edit("service.template", "Description", "Documentation")
    sources.write("new", "x")
    found = {(f.rule, f.path, f.text) for f in lint(sources.directory)}
    assert found == {
        ("git-status", "service.template", "has changes that are not committed"),
        ("git-status", "new", "is not in git"),
    }


def test_a_directory_outside_of_git(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    assert "not-in-git" in {f.rule for f in lint(tmp_path / "x")}


def test_the_tree_of_an_image(sources: Sources, tmp_path: Path) -> None:
    exports = tmp_path / "tree/rootfs/exports"
    exports.mkdir(parents=True)
    for name in ("config.json.template", "service.template", "tmpfiles.template", "manifest.json"):
        (exports / name).write_text((sources.directory / name).read_text())
    (exports / "README").write_text("")
    found = {f.rule for f in lint(tmp_path / "tree")}
    assert found == {"unknown-export", "not-in-git"}


def test_copies_may_be_written_as_a_list(sources: Sources) -> None:
    copy = "COPY *.template manifest.json /exports/"
    sources.edit("Dockerfile", copy, 'COPY ["config.json.template", "s*.template", "/exports/"]')
    assert sources.found() == {("not-copied", False)}
    names = {f.text.partition(" ")[0] for f in lint(sources.directory)}
    assert names == {"tmpfiles.template", "manifest.json"}


def test_the_idiom_of_a_list_that_is_added_to(sources: Sources) -> None:
    text = json.dumps(CONFIG)[:-2] + " $ADDTL_MOUNTS ]}"
    sources.write("config.json.template", text)
    assert sources.found() == {("no-default", False)}
    sources.write("manifest.json", {"defaultValues": {"GREETING": "", "ADDTL_MOUNTS": ""}})
    assert sources.found() == set()


def test_no_directory() -> None:
    with pytest.raises(ContainerError, match="/nowhere is not a directory"):
        lint(Path("/nowhere"))


def test_one_line_each_and_the_exit_code(
    sources: Sources, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["containers", "lint", str(sources.directory)]
    assert cli.main(words) == 0
    assert capsys.readouterr().out == "errors: 0, warnings: 0\n"
    SPOILED["maintainer"][1](sources)
    sources.commit()
    assert cli.main(words) == 0, "a warning keeps no image from working"
    assert capsys.readouterr().out == (
        "warning maintainer: Dockerfile: MAINTAINER is old; use LABEL maintainer=\n"
        "errors: 0, warnings: 1\n"
    )
    SPOILED["root-readonly"][1](sources)
    sources.commit()
    assert cli.main(words) == 1
    first, second, last = capsys.readouterr().out.splitlines()
    assert first.startswith("error root-readonly: config.json.template: ")
    assert second.startswith("warning maintainer: ")
    assert last == "errors: 1, warnings: 1"


def test_the_page_names_every_rule() -> None:
    page = (Path(__file__).parents[2] / "docs/containers.md").read_text()
    told = page.partition("\nErrors, ")[2].partition("\n## ")[0]
    errors, _, warnings = told.partition("Warnings: ")
    for text, wanted in ((errors, True), (warnings, False)):
        rules = {rule for rule, (error, _) in SPOILED.items() if error is wanted}
        others = set() if wanted else {"git-status", "not-in-git", "unknown-export"}
        assert set(re.findall(r"`([a-z-]+)`", text)) == rules | others
