"""The fast dataclass against the standard library's, of the same bodies."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle
from typing import Any

import pytest

from firstboot.protocol import record
from firstboot.protocol.model import Ballot, Register


def bodies(dataclass: Any) -> list[Any]:
    @dataclass(frozen=True, slots=True)
    class Nothing:
        """No field."""

    @dataclass(frozen=True, slots=True)
    class One:
        """One field: its value may be a tuple, too."""

        only: Any

    @dataclass(frozen=True, slots=True, order=True)
    class Several:
        """Defaults of both kinds, a hidden field, a check."""

        number: int
        text: str = "x"
        made: Any = dataclasses.field(default_factory=object)
        secret: str = dataclasses.field(repr=False, default="s")

        def __post_init__(self) -> None:
            if self.number < 0:
                raise ValueError("negative")

    return [Nothing, One, Several]


OURS, THEIRS = bodies(record.dataclass), bodies(dataclasses.dataclass)
ARGUMENTS: list[tuple[int, tuple[Any, ...]]] = [
    (0, ()),
    *((1, (value,)) for value in (1, (), (1,), "a")),
    *((2, given) for given in ((1, "y", 0), (2, "y", 0), (1, "x", (3,)), (1, "x", (3,), "t"))),
]


def test_every_deed_gives_what_the_standard_librarys_gives() -> None:
    for kind, given in ARGUMENTS:
        mine, other = OURS[kind](*given), THEIRS[kind](*given)
        assert repr(mine) == repr(other)
        assert dataclasses.asdict(mine) == dataclasses.asdict(other)
        assert mine.__match_args__ == other.__match_args__
        assert not hasattr(mine, "__dict__")
        assert copy.copy(mine) == copy.deepcopy(mine) == dataclasses.replace(mine) == mine
        assert type(mine).__doc__ == type(other).__doc__


def test_the_same_are_equal_and_hash_alike_and_are_in_the_same_order() -> None:
    for (kind, given), (kind_2, given_2) in itertools.product(ARGUMENTS, repeat=2):
        mine, mine_2 = OURS[kind](*given), OURS[kind_2](*given_2)
        other, other_2 = THEIRS[kind](*given), THEIRS[kind_2](*given_2)
        assert (mine == mine_2) == (other == other_2)
        assert mine != mine_2 or hash(mine) == hash(mine_2)
        if kind == kind_2 == 2:
            assert (mine < mine_2, mine <= mine_2) == (other < other_2, other <= other_2)
            assert (mine > mine_2, mine >= mine_2) == (other > other_2, other >= other_2)
    with pytest.raises(TypeError):
        assert OURS[2](1) < 1
    with pytest.raises(TypeError):
        assert OURS[1](1) < OURS[1](2)


@pytest.mark.parametrize("dataclass", [OURS, THEIRS])
def test_mistakes_are_found(dataclass: list[Any]) -> None:
    with pytest.raises(TypeError):
        dataclass[1]()
    with pytest.raises(TypeError):
        dataclass[2](1, unknown=2)
    with pytest.raises(ValueError, match="negative"):
        dataclass[2](-1)
    one = dataclass[2](1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.number = 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        del one.number
    with pytest.raises((AttributeError, TypeError)):
        one.other = 2
    assert one.number == 1
    with pytest.raises(ValueError, match="negative"):
        dataclasses.replace(one, number=-1)


def test_what_is_made_anew_is_made_for_each() -> None:
    assert OURS[2](1).made is not OURS[2](1).made


def test_the_programs_own_survive_pickling() -> None:
    register = Register(promised=Ballot(3, "0" * 32))
    assert pickle.loads(pickle.dumps(register)) == register
