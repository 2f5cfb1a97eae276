"""What `lint` looks at beside the templates: the Dockerfile, and whether git has it all."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from firstboot.containers.exports import read_text
from firstboot.containers.tools import ContainerError, find, run

GIT_SECONDS = 10.0
LABELS = (
    "architecture", "name", "version", "release", "com.redhat.component", "summary", "license",
    "maintainer", "vendor", "url",
)  # fmt: skip
CONTINUED = re.compile(r"\\\s*\n")
COMMENT = re.compile(r"^\s*#.*\n", re.MULTILINE)
LABEL = re.compile(r"([\w.-]+)=(?:\"([^\"]*)\"|'([^']*)'|(\S*))")

What = tuple[str, bool, str, str]


def dockerfile(directory: Path, exports: Path) -> Iterator[What]:
    """Rule, whether it is an error, file and text of what is wrong with the Dockerfile."""
    text = read_text(directory / "Dockerfile")
    if text is None:
        return
    steps = [line.strip() for line in CONTINUED.sub(" ", COMMENT.sub("", text)).splitlines()]
    labels: dict[str, str] = {}
    copied = []
    for step in steps:
        verb, _, rest = step.partition(" ")
        plain = re.sub(r'[\[\],"]', " ", rest) if "[" in rest else rest
        verb, words = verb.upper(), [word for word in plain.split() if not word.startswith("--")]
        if verb == "MAINTAINER":
            yield _finding("maintainer", "MAINTAINER is old; use LABEL maintainer=")
        if verb == "LABEL":
            for match in LABEL.finditer(rest):
                labels[match[1]] = match[2] or match[3] or match[4] or ""
        if verb in ("COPY", "ADD") and words:
            copied += [word.removeprefix("./").strip("/") for word in words[:-1]]
            yield from _copy(verb, words)
        if (
            verb == "RUN"
            and re.search(r"\b(dnf|yum)\b.*\binstall\b", rest)
            and "nodocs" not in rest
        ):
            yield _finding("nodocs", "dnf install without --setopt=tsflags=nodocs")
    for name in LABELS:
        if name not in labels:
            yield _finding("label", f"the recommended label {name} is missing")
    if labels.get("atomic.type") != "system":
        yield _finding(
            "label-type", "without the label atomic.type=system it takes --system to install"
        )
    if exports == directory:
        for path in sorted((*directory.glob("*.template"), *directory.glob("manifest.json"))):
            if not any(path.match(word) or word in (".", "") for word in copied):
                yield _finding("not-copied", f"{path.name} is not copied into the image")


def _copy(verb: str, words: list[str]) -> Iterator[What]:
    target = words[-1]
    if target.rstrip("/") == "/export" or target.startswith("/export/"):
        yield _finding("export", f"{verb} to {target}; the directory is called /exports/")
    if target == "/exports":
        yield _finding("slash", f"{verb} to /exports has no / at the end, so it may make a file")
    if verb == "ADD" and any(word.endswith(".template") for word in words[:-1]):
        yield _finding("add", "ADD unpacks and fetches; use COPY for templates")


def _finding(rule: str, text: str) -> What:
    return rule, False, "Dockerfile", text


def repository(directory: Path) -> Iterator[What]:
    """The same for what git does not have; nothing where there is no git."""
    if not find("git"):
        return
    try:
        argv = ["git", "-C", str(directory), "status", "--porcelain", "--", "."]
        changed = run(argv, timeout=GIT_SECONDS).splitlines()
    except ContainerError:
        yield "not-in-git", False, ".", "the directory is not in a git repository"
        return
    for line in changed[:20]:
        state, name = line[:2], line[3:].strip('"')
        what = "is not in git" if state == "??" else "has changes that are not committed"
        yield "git-status", False, name, what
