"""The steps of a session: numbered, written down as they are sent, and settled once all hops have taken them."""

from typing import NamedTuple

from corolla.client.steps import StepTokens
from corolla.codec import encode
from corolla.replay import Log, Sent, Store, Trail
from corolla.wire import Step

__all__ = ["Ledger", "Mark"]


class Mark(NamedTuple):
    """Where a session stood."""

    number: int
    rows: tuple[Trail | None, ...]


class Ledger:
    """What the first hop of a session was sent.

    Args:
        rows: How many rows the session has.
        codec: How tensors travel.
        log_bytes: How much is kept in memory.

    Attributes:
        log: What a replay needs.
        under_way: The steps that some hop has not taken yet, by number.
    """

    def __init__(self, rows: int, codec: str, log_bytes: int) -> None:
        self.log = Log(rows)
        self.under_way: dict[int, Step] = {}
        self._codec = codec
        self._store = Store(log_bytes)
        self._number = 0
        self._settled = 0

    @property
    def mark(self) -> Mark:
        """Where the session stands."""
        return Mark(self._number, self.log.rows)

    async def write(self, tokens: StepTokens, taps: tuple[int, ...]) -> tuple[Step, Sent]:
        """Write a step down before it is sent.

        Args:
            tokens: The step.
            taps: Blocks whose outputs are wanted as well.

        Returns:
            What to send.
        """
        self._number += 1
        encoded = encode(tokens.hidden_ND, self._codec)
        sent = self._store.keep(encoded.meta, encoded.buffers)
        step = Step(
            starts=tokens.starts,
            counts=tokens.counts,
            order=tokens.order,
            taps=taps,
            hidden=sent.meta,
            number=self._number,
            settled=self._settled,
        )
        self.log.note(step, sent)
        self.under_way[step.number] = step
        await self._store.settle()
        return step, sent

    def settle(self, number: int) -> None:
        """Note that all hops have taken the steps up to this one."""
        for settled in [one for one in self.under_way if one <= number]:
            del self.under_way[settled]
            self._settled = settled
        self.log.settle(self._settled)

    def skips(self, done: int, number: int) -> bool:
        """Say whether a hop that has taken the steps up to ``done`` lies if it says that it has taken this one."""
        return number > self._number or any(done < one < number for one in self.under_way)

    def restore(self, mark: Mark, *, is_untaken: bool) -> None:
        """Come back to where the session stood.

        Args:
            mark: Where that was.
            is_untaken: Whether no hop has taken a step since, so that their numbers are free again.
        """
        self.log.restore(mark.rows)
        self.under_way.clear()
        if is_untaken:
            self._number = mark.number
