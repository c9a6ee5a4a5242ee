"""What `fastok.apply` returns: the way back, and what the last forward did."""

from types import TracebackType
from typing import Any, Protocol

from torch import Tensor

from ..token_map import SoftMap, TokenMap
from .session import Stats
from .swap import Swaps


class Work(Protocol):
    """What a handle reports on."""

    @property
    def token_map(self) -> TokenMap | SoftMap | list[TokenMap | SoftMap]:
        """The map of the last forward."""

    @property
    def stats(self) -> Stats:
        """Token counts and time of the last forward."""


class Handle:
    """A reducer applied to a model. Leaving it as a context manager, or `remove`, makes the model what it was.

    A forward compiled by ``torch.compile`` reduces as it should but records nothing: ``stats.tokens`` is empty then.
    """

    def __init__(self, work: Work, swaps: Swaps) -> None:
        self._work = work
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
    def token_map(self) -> Any:
        """The map of the last forward from the encoder's input tokens to its output tokens, over all layers.

        Of a vision-language model: a list with one map for each image (or video) of the last prompt that had any, from
        its tokens in raster order to what is left of them. Its samples are the image's crops, or a video's frames,
        where the model encodes these apart; `patches` says where they lie in it.

        Raises:
            RuntimeError: no forward has been recorded.
        """
        return self._work.token_map

    @property
    def patches(self) -> list[list[Tensor]]:
        """Of a vision-language model: where the patches of each image went, as they lie in it; for `viz.draw_patches`.

        A list for each image (or video) of the last prompt that had any, with int64 ``[h,w]`` for each picture that it
        was encoded as: one; with crops, the thumbnail, and the map stitched of the crops as far as it is in the prompt;
        of a video, one for each frame (two, in Qwen's). An entry is the place, among the tokens left of that image, of
        the one that the patch (Qwen: each 2 x 2 patches) went into, -1 if it was dropped. Of several (`SoftMap`), it is
        the one in which the patch weighs most.

        Raises:
            RuntimeError: no prompt with images was seen. TypeError: the model is an encoder alone.
        """
        if not hasattr(self._work, "patches"):
            raise TypeError("patches are of a vision-language model's images; of an encoder, see token_map")
        patches: list[list[Tensor]] = self._work.patches
        return patches

    @property
    def stats(self) -> Stats:
        """Token counts and time of the last forward (of a vision-language model: with images). Waits for the device."""
        return self._work.stats
