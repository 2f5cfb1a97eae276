"""``python -m firstboot``."""

from firstboot.cli import program

program()
