"""Late patterns: what is put off on import works when it is used after all."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from firstboot.late import Late, late_patterns

USED = """
import re
from firstboot.late import Late, late_patterns
with late_patterns():
    import yaml
    from cryptography import x509
    from cryptography.x509 import name
assert re.compile("a+").match("aa"), "compiled as ever afterwards"
assert not isinstance(re.compile("a"), Late)
late = [item for kind in (*vars(name).values(), yaml.reader.Reader) for item in
        (*getattr(kind, "__dict__", {}).values(), kind) if isinstance(item, Late)]
assert len(late) >= 2, "the two that take long are put off"
assert x509.Name.from_rfc4514_string("CN=a,O=b").rfc4514_string() == "CN=a,O=b"
try:
    x509.Name.from_rfc4514_string("CN=a,=")
except ValueError:
    pass
else:
    raise AssertionError("a wrong name is read")
read = yaml.load("a: 2020-02-30x\\nb: 2020-02-03\\nc: 1_000", yaml.SafeLoader)
assert [type(x).__name__ for x in read.values()] == ["str", "date", "int"], read
try:
    yaml.load("a: \\x01", yaml.SafeLoader)
except yaml.reader.ReaderError:
    pass
else:
    raise AssertionError("a control character is read")
"""


def test_other_packages_work_with_them() -> None:
    subprocess.run([sys.executable, "-c", USED], check=True, timeout=60)


def test_a_late_pattern_is_the_pattern() -> None:
    late, real = Late(r"(?P<n>[0-9]+)x", re.I), re.compile(r"(?P<n>[0-9]+)x", re.I)
    assert late.pattern == real.pattern and late.groupindex == real.groupindex
    assert late.fullmatch("12X")["n"] == "12" and late.search("y") is None
    with pytest.raises(re.error):
        Late("(", 0).match  # noqa: B018  asking is what compiles


def test_nobody_elses_are_late_and_an_error_leaves_nothing_behind() -> None:
    before = re.compile
    with pytest.raises(KeyError), late_patterns():
        assert isinstance(re.compile("a"), re.Pattern)
        raise KeyError
    assert re.compile is before
