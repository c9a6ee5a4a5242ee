"""What `fastok.apply` returns: the way back, and what the last forward did."""

from dataclasses import dataclass
from types import TracebackType

from ..token_map import SoftMap, TokenMap
from .session import Session
from .swap import Swaps


@dataclass(frozen=True)
class Stats:
    """What the last forward did.

    Attributes:
        tokens: number of tokens after each layer, class and other special tokens included; a list with one number per
            sample where these differ. Empty before the first forward.
        seconds: time from entering the first layer to leaving the last by the host's clock; a GPU may still be at work.
            None before the first forward.
    """

    tokens: list[int | list[int]]
    seconds: float | None


class Handle:
    """A reducer applied to a model. Leaving it as a context manager, or `remove`, makes the model what it was.

    A forward compiled by ``torch.compile`` reduces as it should but records nothing: ``stats.tokens`` is empty then.
    """

    def __init__(self, session: Session, swaps: Swaps) -> None:
        self._session = session
        self._swaps = swaps

    def __enter__(self) -> "Handle":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def remove(self) -> None:
        """Make the model what it was. What was recorded stays readable. May be called again."""
        self._swaps.restore()

    @property
    def token_map(self) -> TokenMap | SoftMap:
        """The map of the last forward from the encoder's input tokens to its output tokens, over all layers.

        Raises:
            RuntimeError: no forward has been recorded.
        """
        session = self._session
        if session.input is None or not session.maps:
            raise RuntimeError("no forward was recorded since apply (a compiled one records nothing)")
        batch, n, device = session.input
        composed: TokenMap | SoftMap = TokenMap.identity(batch, n, device)
        for token_map in session.maps.values():
            if token_map is not None:
                composed = composed.then(token_map)
        return composed

    @property
    def stats(self) -> Stats:
        """Token counts and time of the last forward. Reading it waits for the device."""
        session = self._session
        tokens: list[int | list[int]] = []
        now: int | list[int] = session.input[1] if session.input is not None else 0
        for token_map in session.maps.values():
            if token_map is not None:
                now = _count(token_map)
            tokens.append(now)
        return Stats(tokens, session.seconds)


def _count(token_map: TokenMap | SoftMap) -> int | list[int]:
    if isinstance(token_map, SoftMap):
        return token_map.n_out
    counts: list[int] = token_map.counts.tolist()
    return counts if any(count != token_map.n_out for count in counts) else token_map.n_out
