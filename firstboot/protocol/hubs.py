"""Whom a host of a large formation connects to: the few hosts that stand best.

Those, the hubs, are connected to by everybody, so they see everybody, and one of them proposes.
What a host costs its peers then does not grow with their number, and only a hub's work does.
"""

from __future__ import annotations

from firstboot.protocol.messages import Known
from firstboot.protocol.model import Endpoint
from firstboot.protocol.peers import AddressBook, Company, Standing, standing


class Hubs:
    """The search for them: who stands better than those that are present is dialled."""

    def __init__(self, count: int, mine: Standing, company: Company, book: AddressBook) -> None:
        self.count, self._mine = count, mine
        self._company, self._book = company, book
        self._candidates: dict[str, tuple[Standing, Endpoint]] = {}
        self._told: list[Standing] = []
        self._sought = -1  # the version of the company that was last compared

    def hear_of(self, known: Known) -> None:
        """A peer hands on another."""
        stands = standing(known.node_id, known.rank, able=known.able)
        self._candidates[known.node_id] = stands, known.endpoint
        self._sought = -1
        if len(self._candidates) > 2 * self.count:
            del self._candidates[max(self._candidates, key=lambda i: self._candidates[i])]

    def failed(self, endpoint: Endpoint) -> None:
        """Nobody answers there; who hears of that host again says so."""
        for node_id in [i for i, (_, where) in self._candidates.items() if where == endpoint]:
            del self._candidates[node_id]

    def seek(self) -> None:
        """Have the candidates dialled that stand better than the last hub this host sees."""
        if self._sought == self._company.version:
            return
        self._sought = self._company.version
        best = self._company.standings
        last = best[self.count - 1] if len(best) >= self.count else None
        for node_id, (stands, endpoint) in list(self._candidates.items()):
            if last is None or stands < last:
                self._book.want(endpoint)
            else:
                del self._candidates[node_id]

    @property
    def lonely(self) -> bool:
        """Whether this host knows of addresses and has too few connections to learn from."""
        book = self._book
        return bool(book.parked) and book.reached + book.dialling < self.count

    def want_another(self) -> None:
        """Have one more address dialled, the newest: it is the likeliest to answer."""
        self._book.want(next(reversed(self._book.parked)))

    def explore(self) -> None:
        """Somebody is still missing: a hub dials every address, any other host one more.

        Groups that know nothing of each other meet like this. Who has met few hosts cannot tell
        yet whether it is a hub.
        """
        if self.among and len(self._company) >= 2 * self.count:
            for endpoint in list(self._book.parked):
                self._book.want(endpoint)
        elif self._book.parked and self._book.reached < 4 * self.count:
            self.want_another()

    def news(self) -> bool:
        """Whether this host is one and the best have changed since this was last asked."""
        if not self.among:
            return False
        best = self._company.standings[: self.count]
        changed, self._told = best != self._told, best
        return changed

    @property
    def among(self) -> bool:
        """Whether this host is a hub itself, as far as it sees."""
        return self._company.before(self._mine) < self.count

    def present(self) -> int:
        """The most voters that one of the hubs counts, as far as it told."""
        hubs = self._company.best(self.count)
        return max((p.hello.present for p in hubs if p.hello is not None), default=0)
