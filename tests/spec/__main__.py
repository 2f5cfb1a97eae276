"""``python -m tests.spec`` (``make explore``): the search of `test_register` in larger bounds."""

from __future__ import annotations

import time

from firstboot.protocol.election import Purpose
from tests.spec.register import Plan, Spec, candidate

F, R, X, A = Purpose.FOUND, Purpose.READ, Purpose.REPLACE, Purpose.ACTIVATE
# The rounds of a, b and c; whether a is the master of epoch 1 to begin with; slow disks.
LARGER: tuple[tuple[Plan, bool, set[int]], ...] = (
    (((F, F), (F,), (F,)), False, set()),
    (((F,), (F,), (R, R)), False, set()),
    (((), (X, X), (X,)), True, set()),
    (((A, A), (X, X), ()), True, set()),
    (((F, A), (F,), (X,)), False, set()),
    (((F, F), (F,), ()), False, {1}),
    (((F, F), (F,), ()), False, {2}),
    (((F, F), (), ()), False, {0, 1, 2}),
    (((F,), (F,), ()), False, {0, 1, 2}),
    (((A,), (X,), ()), True, {0, 1, 2}),
)


def main() -> None:
    """Print one line for each bounded world; Broken ends it."""
    total, started = 0, time.monotonic()
    for plan, decided, slow in LARGER:
        spec = Spec(plan, chosen=candidate(0, 1) if decided else None, slow=frozenset(slow))
        states = spec.explore(limit=20_000_000)
        total += states
        rounds = " ".join("+".join(p.value[:3] for p in mine) or "-" for mine in plan)
        seconds = time.monotonic() - started
        print(f"{states:9} states  rounds {rounds:20}  slow disks {sorted(slow)}  {seconds:.0f} s")
    print(f"{total} states, no rule broken")


if __name__ == "__main__":
    main()
