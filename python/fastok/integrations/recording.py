"""``record_scores``: what the attention of a model attended to, layer by layer, while it runs."""

from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ..ops.attention import attention_scores
from ..ops.scores import ScoreSpec


class LayerScores(tuple[Tensor, ...]):
    """The scores of one attention run, one tensor per spec.

    Attributes:
        layer: the number that the model gives to the layer (``layer_idx``), None where it gives none.
    """

    layer: int | None

    def __new__(cls, scores: Iterable[Tensor], layer: int | None = None) -> "LayerScores":  # noqa: D102
        self = super().__new__(cls, scores)
        self.layer = layer
        return self


class record_scores:
    """Collect scores from every ``attn_implementation="fastok"`` attention that runs inside this context.

    ::

        fastok.register_transformers()
        model.set_attn_implementation("fastok")
        with fastok.record_scores(fastok.ScoreSpec(rows="last")) as recorded:
            model(input_ids)
        recorded[3][0]  # layer 3, first spec: [B,T], what the last token attended to

    Args:
        specs: what to record, see :class:`fastok.ScoreSpec`; column sums of all rows by default.

    A sequence of :class:`LayerScores` in the order in which layers ran: after one forward, ``recorded[i][j]`` is layer
    i's tensor for spec j, shaped as :func:`fastok.attention_scores` gives it. Further forwards (each step of
    ``generate``) append; :meth:`clear` forgets. Keys are those that the attention was given; padding among them has
    score 0. With ``output_attentions=True`` the model's output has the same tensors in ``attentions``.

    Contexts nest, and each records everything that runs inside it. Works with and without gradients; scores carry none,
    and what gradient checkpointing computes again is not recorded again. One thread. Not inside a graph traced by
    ``torch.compile``: NotImplementedError.
    """

    def __init__(self, *specs: ScoreSpec) -> None:
        for spec in specs:
            if not isinstance(spec, ScoreSpec):
                raise TypeError(f"specs must be fastok.ScoreSpec, got {type(spec).__name__} {spec!r}")
        self.specs = specs or (ScoreSpec(),)
        self._layers: list[LayerScores] = []

    def __enter__(self) -> "record_scores":
        if any(active is self for active in _active):
            raise RuntimeError("this record_scores is recording already; make another one")
        _active.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _active[:] = [active for active in _active if active is not self]

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, index: int) -> LayerScores:
        return self._layers[index]

    def __iter__(self) -> Iterator[LayerScores]:
        return iter(self._layers)

    def clear(self) -> None:
        """Forget what was recorded."""
        self._layers.clear()


_active: list[record_scores] = []


def recording() -> bool:
    """Whether scores are wanted."""
    return len(_active) > 0


def record(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, layer: int | None, masking: dict[str, Any]
) -> Tensor | LayerScores | None:
    """Let all active contexts have their scores of one attention run. Gives those of the innermost.

    Args:
        q, k, v, lse: of :func:`fastok.attention`, called with ``masking``.
        layer: the layer's number.
        masking: the other arguments.
    """
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            "record_scores: required, scores of a forward inside torch.compile; supported, an uncompiled forward; "
            "missing, recording in a compiled graph"
        )
    if torch._C._current_graph_task_id() != -1:
        return None  # gradient checkpointing runs the layer again, in backward
    done: dict[int, Tensor] = {}  # one spec object in several contexts is computed once
    for context in _active:
        for spec in context.specs:
            if id(spec) not in done:
                done[id(spec)] = attention_scores(q, k, lse=lse.detach(), spec=spec, v=v, **masking)
        context._layers.append(LayerScores((done[id(spec)] for spec in context.specs), layer))
    innermost = _active[-1]._layers[-1]
    return innermost[0] if len(innermost) == 1 else innermost
