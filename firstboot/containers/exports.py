"""What an image's ``/exports`` directory says, and how its templates are filled in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

from firstboot.containers.disk import read_if_there
from firstboot.containers.tools import ContainerError


@dataclass(frozen=True, slots=True)
class Manifest:
    """``/exports/manifest.json``; keys it does not know are ignored."""

    default_values: Mapping[str, str] = field(default_factory=dict)
    rename_files: Mapping[str, str] = field(default_factory=dict)
    files_template: tuple[str, ...] = ()
    has_service: bool = True
    use_links: bool = True


def read_manifest(exports: Path, image: str) -> Manifest:
    """The image's manifest, all defaults if it has none; ContainerError names `image`."""
    raw = read_if_there(exports / "manifest.json")
    if raw is None:
        return Manifest()
    try:
        document = json.loads(raw)
    except ValueError as error:
        raise ContainerError(f"Invalid manifest.json file in image: {image}: {error}") from None
    if not isinstance(document, dict):
        raise ContainerError(f"Invalid manifest.json file in image: {image}: not a mapping")
    return Manifest(
        default_values=_mapping(document, "defaultValues", image),
        rename_files=_mapping(document, "renameFiles", image),
        files_template=_paths(document, "installedFilesTemplate", image),
        has_service=not _flag(document, "noContainerService", False, image),
        use_links=_flag(document, "useLinks", True, image),
    )


def read_text(path: Path) -> str | None:
    """A template's text, None if the image has no such file."""
    raw = read_if_there(path)
    try:
        return None if raw is None else raw.decode()
    except UnicodeDecodeError:
        raise ContainerError(f"The template file '{path}' is not UTF-8") from None


def render(path: Path, text: str, values: Mapping[str, str]) -> str:
    """`text` with ``$NAME`` and ``${NAME}`` filled in once and ``$$`` made ``$``.

    Values are text: they are neither quoted nor expanded again. `path` is for errors only.
    """
    try:
        return Template(text).substitute(values)
    except KeyError as error:
        raise ContainerError(
            f"The template file '{path}' still contains an unreplaced value for: '{error}'"
        ) from None
    except ValueError as error:
        raise ContainerError(f"The template file '{path}' is not valid: {error}") from None


def _mapping(document: dict[str, Any], key: str, image: str) -> dict[str, str]:
    found = document.get(key) or {}
    if not isinstance(found, dict) or not all(isinstance(v, str | int) for v in found.values()):
        raise _wrong(image, f"{key} is not a mapping of texts")
    return {name: str(value) for name, value in found.items()}


def _paths(document: dict[str, Any], key: str, image: str) -> tuple[str, ...]:
    found = document.get(key) or []
    if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
        raise _wrong(image, f"{key} is not a list of paths")
    return tuple(found)


def _flag(document: dict[str, Any], key: str, default: bool, image: str) -> bool:
    found = document.get(key, default)
    if not isinstance(found, bool):
        raise _wrong(image, f"{key} is neither true nor false")
    return found


def _wrong(image: str, what: str) -> ContainerError:
    return ContainerError(f"Invalid manifest.json file in image: {image}: {what}")
