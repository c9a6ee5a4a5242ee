"""``attn_implementation="fastok"`` for transformers 5: an attention function, and a mask function with small masks.

transformers asks the mask function once per forward, and hands what it returns to the attention of every layer. A mask
of ours is a tensor, because only tensors survive ``generate`` and compiled graphs on the way, but it is never S x T:

* ``uint8 [B,1,code,T']``: which keys may be seen at all (padding, unfilled slots of a static cache).
* ``uint8 [B,0,code,T']``: all of them; nothing is stored.
* ``int32 [1,1,code,sequences + 1]``: several sequences in each row; where they begin in the flattened batch.

``code - 1`` is an index into a table of (left, right) windows: causal, sliding, none. Keys behind T' (unfilled slots,
again) are cut off, so that the last query always belongs to the last key, as :func:`fastok.attention` has it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..flash import padded
from ..ops.attention import attention
from ..reference.attention import log_add
from . import recording
from .held import Held, handle_of
from .session import in_autocast

NAME = "fastok"
Window = tuple[int, int]  # keys to the left and right of a query's own that it sees; -1 is unbounded

_windows: list[Window] = [(-1, -1), (-1, 0)]
"""By code. All windows that models of this process have used; there are few."""


def register_transformers() -> None:
    """Make ``attn_implementation="fastok"`` known to transformers (5.x): attention and masks of fastok in its models.

    ::

        fastok.register_transformers()
        model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="fastok")
        # or, for a model that is there: model.set_attn_implementation("fastok")

    Serves decoders and encoders that use transformers' attention interface: grouped queries, sliding windows, logit
    softcapping, attention sinks, left and right padding, dynamic, static and sliding caches, beam search, several
    sequences per row (by ``position_ids`` or ``cu_seq_lens_q``), training, fp32, fp16 and bf16. Queries that see
    nothing, being padding themselves, give 0. No S x T mask is ever made.

    ``output_attentions=True`` gives, in place of S x T matrices, the compact scores that the context
    ``with fastok.record_scores(...)`` around the call asks for; without that context it is an error.

    Raises:
        ImportError: no transformers, or one without the attention interface.
        NotImplementedError: later, from a model: dropout in attention, relative position biases, paged caches, masks
            that are not made of causality, windows, padding and packing. The message names the argument.

    May be called again. Imports transformers.
    """
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface
    except ImportError as error:
        raise ImportError("register_transformers needs transformers 5: pip install fastok[transformers]") from error
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


# ---- masks -----------------------------------------------------------------------------------------------------------


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Tensor:
    """The mask function, with transformers' arguments. Returns a mask as described above.

    Args:
        batch_size, q_length, kv_length: numbers of rows, queries and keys.
        q_offset, kv_offset: positions of the first query and the first key. Static caches give a tensor.
        mask_function: transformers' composition of who sees whom; None is causal.
        attention_mask: bool ``[B,positions]``, False for padding.
        device: of the mask.
        options: what else transformers tells its mask functions, which counts inside ``torch.compile`` only.

    Raises:
        NotImplementedError: a composition with a part that is neither causality, window nor packing.
    """
    packable = attention_mask is None and q_length == kv_length > 1
    begins: Tensor | None = None
    if mask_function is None:
        left, right = -1, 0
    elif torch.compiler.is_compiling():
        (left, right), packed = _traced(mask_function, options)
        if packed and packable:
            begins = _begins(mask_function, batch_size, q_length, device)
    else:
        (left, right), sequence = _parsed(mask_function)
        if sequence is not None:
            begins = sequence != F.pad(sequence[:, :-1], (1, 0), value=-1)
    if begins is not None:
        return _packed_mask(begins, _code((left, right)))
    visible = None
    if attention_mask is not None:
        visible = F.pad(attention_mask, (0, max(kv_offset + kv_length - attention_mask.shape[-1], 0)))
        visible = visible[:, kv_offset : kv_offset + kv_length].to(device)
    first = q_offset - kv_offset  # where the first query stands among the keys
    if q_length == 1:
        # What a single query sees can be said key by key.
        if isinstance(first, Tensor):
            distance = torch.arange(kv_length, device=device) - first.to(device)
            near = (distance >= -left if left >= 0 else distance == distance) & (
                distance <= right if right >= 0 else True
            )
            visible = near.expand(batch_size, -1) if visible is None else visible & near
        else:
            kv_length = min(kv_length, first + right + 1) if right >= 0 else kv_length
            visible = None if visible is None else visible[:, :kv_length]
            if left >= 0 and first > left:
                near = torch.arange(kv_length, device=device) >= first - left
                visible = near.expand(batch_size, -1) if visible is None else visible & near
        left = right = -1
    elif (left, right) != (-1, -1):
        if isinstance(first, Tensor) and torch.compiler.is_compiling():
            raise NotImplementedError(
                "past_key_values: required, several queries behind a filled static cache inside torch.compile; "
                "supported, one query there, or an uncompiled forward"
            )
        end = int(first) + q_length
        if end > kv_length or (end < kv_length and right != 0):
            raise NotImplementedError(
                f"mask_function: required, a window for queries {int(first)} to {end} of {kv_length} keys; "
                "supported, queries at the end of the keys"
            )
        kv_length = end
        visible = None if visible is None else visible[:, :end]
    # Reading a tensor's values would break a graph; one number per forward is what the other implementations read too.
    if visible is not None and not torch.compiler.is_compiling() and bool(visible.all()):
        visible = None
    code = _code((left, right))
    if visible is None:
        return torch.empty(batch_size, 0, code, kv_length, dtype=torch.uint8, device=device)
    return visible.to(torch.uint8)[:, None, None].expand(-1, -1, code, -1)


def hides_nothing(mask: Tensor | None) -> bool:
    """Whether a mask, one of ours or not, lets every query see every key."""
    return mask is None or (mask.dtype == torch.uint8 and mask.shape[1:3] == (0, 1))


def _code(window: Window) -> int:
    if window not in _windows:
        _windows.append(window)
    return _windows.index(window) + 1


def _parsed(function: Callable[..., Any]) -> tuple[Window, Tensor | None]:
    """The window that a mask function stands for, and ``[B,S]`` sequence numbers if it keeps sequences apart."""
    name = getattr(function, "__qualname__", repr(function)).removesuffix(".<locals>.inner_mask")
    inside = _closure(function)
    match name.removesuffix(".<locals>.and_mask"):
        case "causal_mask_function":
            return (-1, 0), None
        case "bidirectional_mask_function":
            return (-1, -1), None
        case "sliding_window_overlay":
            return (inside["sliding_window"] - 1, -1), None
        case "sliding_window_bidirectional_overlay":
            return (inside["sliding_window"], inside["sliding_window"]), None
        case "packed_sequence_mask_function":
            return (-1, -1), inside["packed_sequence_mask"]
        case "remap_positions_for_packed_sequence":
            return _parsed(inside["mask_function"])  # positions within a sequence: differences stay the same
        case "and_masks":
            window, sequence = (-1, -1), None
            for (left, right), part in map(_parsed, inside["mask_functions"]):
                window = _narrower(window[0], left), _narrower(window[1], right)
                sequence = part if sequence is None else sequence
            return window, sequence
    raise _unknown(name)


def _unknown(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"mask_function: required, {name}; supported, causality, sliding windows, padding, packed sequences; "
        "use attn_implementation='sdpa' for this model"
    )


def _traced(function: Callable[..., Any], options: dict[str, Any]) -> tuple[Window, bool]:
    """The same from what can be known inside ``torch.compile``, and whether sequences may be kept apart."""
    name: str = function.__name__
    if name == "causal_mask_function":
        return (-1, 0), False
    if name == "bidirectional_mask_function":
        return (-1, -1), False
    size, config = options.get("local_size"), options.get("config")
    window, chunk = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    if name != "and_mask" or options.get("use_vmap") or size not in (None, window) or (size and size == chunk):
        raise _unknown(f"{name} inside torch.compile")
    if "allow_is_bidirectional_skip" in options:
        return (size, size) if size else (-1, -1), False
    return (size - 1 if size else -1, 0), True


def _begins(function: Callable[..., Any], batch: int, length: int, device: torch.device | str) -> Tensor:
    """Bool ``[B,S]``: tokens that do not see the one before them."""
    rows, later = torch.arange(batch, device=device)[:, None], torch.arange(1, length, device=device)[None]
    sees = function(rows, torch.zeros_like(rows), later, later - 1)
    return F.pad(~sees.expand(batch, -1), (1, 0), value=True)


def _closure(function: Callable[..., Any]) -> dict[str, Any]:
    """A nested function's free variables."""
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    if code is None or cells is None:
        return {}
    return {name: cell.cell_contents for name, cell in zip(code.co_freevars, cells, strict=True)}


def _narrower(a: int, b: int) -> int:
    return max(a, b) if a < 0 or b < 0 else min(a, b)


def _packed_mask(begins: Tensor, code: int) -> Tensor:
    """``begins[B,S]`` says where sequences begin in each row; the mask has where they do in the flattened batch."""
    total = begins.numel()
    if torch.compiler.is_compiling():
        # How many there are is not known: all the others are empty ones at the end.
        places = torch.arange(total, device=begins.device)
        starts = torch.where(begins.flatten(), places, total).sort().values
    else:
        starts = begins.flatten().nonzero()[:, 0]
    # Not F.pad, which would compile for each total anew.
    return torch.cat([starts, starts.new_full((1,), total)]).to(torch.int32).expand(1, 1, code, -1)


# ---- attention -------------------------------------------------------------------------------------------------------


class _Mask(NamedTuple):
    """A mask in the terms of :func:`fastok.attention`."""

    window: Window
    key_bias: Tensor | None = None
    n_keys: int | None = None
    cu_seqlens: tuple[Tensor, Tensor] | None = None


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | recording.LayerScores | None]:
    """The attention function, with transformers' arguments.

    Args:
        module: the attention module that calls; its ``is_causal`` counts where there is no mask.
        query, key, value: ``[B,H,S,D]``, ``[B,G,T,D]``, ``[B,G,T,*]``.
        attention_mask: from :func:`attention_mask`, or bool or additive with one row for all queries, ``[B,1|H,1,T]``.
        dropout: 0. scaling, softcap: of the logits.
        sliding_window, is_causal: count where there is no mask.
        s_aux: ``[H]``, a logit per head of an attention sink: softmax over keys and sink.
        kwargs: ``cu_seq_lens_q``, ``cu_seq_lens_k`` (one row of packed sequences) and ``output_attentions`` count;
            what would change the attention is refused by name; the rest concerns others.

    Returns:
        ``[B,S,H,D]``, and the scores recorded, or None.
    """
    _refuse(dropout, kwargs)
    handle = handle_of(key)
    held = None if handle is None else handle.layer
    if handle is not None:
        key, value = handle.keys, handle.values
    query, key, value = in_autocast(query, key, value)
    width = value.shape[-1]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    n_k = key.shape[2] if held is None else held.length
    mask = _understood(module, query, n_k, attention_mask, sliding_window, is_causal, kwargs)
    if held is not None:
        held.called_by(module, kwargs.get("position_ids"), sliding_window)
    if held is not None and (held.whole or n_k > key.shape[2]):
        if _in_place(held, query, mask):
            out, lse = held.attend(query.transpose(1, 2), scaling, softcap, mask.key_bias)
            return _with_sink(out, lse, s_aux)[0].contiguous(), None
        key, value = (x.to(query.dtype) for x in held.unpacked())
    q, k, v = (padded(x.transpose(1, 2)) for x in (query, key, value))
    if mask.n_keys is not None and mask.n_keys < k.shape[1]:
        k, v = k[:, : mask.n_keys], v[:, : mask.n_keys]
    batch = q.shape[0]
    masking: dict[str, Any] = {
        "scale": scaling,
        "causal": mask.window[1] == 0,
        "window": None if mask.window in ((-1, -1), (-1, 0)) else mask.window,
        "softcap": softcap,
        "key_bias": mask.key_bias,
    }
    if mask.cu_seqlens is not None:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        masking |= {"cu_seqlens_q": mask.cu_seqlens[0], "cu_seqlens_k": mask.cu_seqlens[1]}
        masking |= {"max_seqlen_q": kwargs.get("max_length_q"), "max_seqlen_k": kwargs.get("max_length_k")}
    out, lse = attention(q, k, v, **masking)
    out, lse = _with_sink(out, lse, s_aux)
    if held is not None and held.observes:
        held.observe(q, k, lse, masking)
    scores = (
        recording.record(q, k, v, lse, getattr(module, "layer_idx", None), masking) if recording.recording() else None
    )
    if scores is None and not recording.recording() and _wants_attentions(kwargs):
        raise NotImplementedError(
            "output_attentions=True: required, S x T matrices; supported, the compact scores asked for by "
            "'with fastok.record_scores(fastok.ScoreSpec(...)):' around the call; missing, that context"
        )
    out = out.unflatten(0, (batch, -1)) if mask.cu_seqlens is not None else out
    return out[..., :width].contiguous(), scores


def _in_place(held: Held, query: Tensor, mask: "_Mask") -> bool:
    """Whether a cache can be read in place: few rows, causal, nothing to be recorded."""
    rows = query.shape[2]
    if query.requires_grad:
        raise NotImplementedError("gradients: required, through a cache that is read in place; supported, inference")
    seen = mask.window == (-1, 0) or (rows == 1 and mask.window == (-1, -1))
    return rows <= held.most_rows and seen and mask.cu_seqlens is None and not recording.recording()


def _with_sink(out: Tensor, lse: Tensor, s_aux: Tensor | None) -> tuple[Tensor, Tensor]:
    """``out[…,S,H,D]`` and ``lse[…,H,S]`` of a softmax over one more logit for each head, whose value is 0."""
    if s_aux is None:
        return out, lse
    sink = s_aux.float()[:, None]
    total = log_add(lse, sink)
    share = torch.exp(lse - total).transpose(-1, -2)[..., None]
    return (out * share).to(out.dtype), total


def _refuse(dropout: float, kwargs: dict[str, Any]) -> None:
    for name, given, supported in (
        ("dropout", dropout or None, "0.0 (set the config's attention_dropout to 0)"),
        *((name, kwargs.get(name), "None") for name in _CHANGES_ATTENTION),
    ):
        if given is not None:
            what = given if isinstance(given, (int, float)) else type(given).__name__
            raise NotImplementedError(
                f"{name}: required, {what}; supported by attn_implementation='fastok', {supported}; missing, {name}"
            )


_CHANGES_ATTENTION = ("position_bias", "cache", "sinks", "head_mask", "block_indices", "indices", "alibi")


def _understood(
    module: nn.Module,
    query: Tensor,
    n_k: int,
    mask: Tensor | None,
    sliding_window: int | None,
    is_causal: bool | None,
    kwargs: dict[str, Any],
) -> _Mask:
    n_q = query.shape[2]
    if mask is None:
        causal = (getattr(module, "is_causal", True) if is_causal is None else is_causal) and n_q > 1
        if causal and n_q != n_k:
            raise NotImplementedError(
                f"attention_mask: required, one that places {n_q} causal queries among {n_k} keys; got None"
            )
        reach = -1 if sliding_window is None else sliding_window - 1
        understood = _Mask((reach, 0 if causal else reach))
    elif mask.dim() != 4 or (mask.dtype not in (torch.uint8, torch.int32) and mask.shape[2] != 1):
        raise NotImplementedError(
            f"attention_mask: required, {list(mask.shape)}, a row for every query; supported, bool [B,positions], "
            "from which fastok makes its own; use attn_implementation='sdpa' for other masks"
        )
    elif mask.dtype == torch.int32:
        understood = _Mask(_windows[mask.shape[2] - 1], cu_seqlens=(mask[0, 0, 0], mask[0, 0, 0]))
    else:
        window = _windows[mask.shape[2] - 1] if mask.dtype == torch.uint8 else (-1, -1)
        understood = _Mask(window, _key_bias(mask, query), mask.shape[3])
    starts = kwargs.get("cu_seq_lens_q")
    if starts is not None and understood.cu_seqlens is None:
        if query.shape[0] != 1 or understood.key_bias is not None:
            raise NotImplementedError("cu_seq_lens_q: required, with padding or rows; supported, one row, no padding")
        understood = understood._replace(cu_seqlens=(starts, kwargs["cu_seq_lens_k"]))
    return understood


def _key_bias(mask: Tensor, query: Tensor) -> Tensor | None:
    """fp32 ``[B,T]`` or ``[B,H,T]``: additive masks as they are, -inf for keys that may not be seen."""
    if mask.shape[1] == 0:
        return None
    rows = mask[:, :, 0].expand(query.shape[0], -1, -1)
    if not mask.is_floating_point():
        rows = torch.zeros_like(rows, dtype=torch.float32).masked_fill(rows == 0, -torch.inf)
    return rows[:, 0].float() if rows.shape[1] == 1 else rows.float()


def _wants_attentions(kwargs: dict[str, Any]) -> bool:
    """Whether attentions were asked for, which not every model says to its attention function."""
    if kwargs.get("output_attentions"):
        return True
    if torch.compiler.is_compiling():
        return False
    from transformers.utils import output_capturing

    return "attentions" in (output_capturing._active_collector.get() or ())
