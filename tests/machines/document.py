"""The one user-data that machines of a test share."""

from __future__ import annotations

import textwrap

from firstboot.userdata import make_token


def document(expect: int, token: str = "", **more: str) -> str:
    """A firstboot document; `more` are further lines, key to YAML text."""
    lines = ["cluster: demo", f"token: {token or make_token()}", f"expect: {expect}"]
    return "\n".join([*lines, *(f"{key}: {text}" for key, text in more.items()), ""])


def user_data(text: str) -> str:
    """A #cloud-config that writes this document, as cloud-config/three-hosts.yaml does."""
    return (
        "#cloud-config\n"
        "write_files:\n"
        "- path: /etc/firstboot/config.yaml\n"
        "  permissions: '0600'\n"
        "  content: |\n" + textwrap.indent(text, "    ")
    )
