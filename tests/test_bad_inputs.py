"""Whatever attention's public functions are given: a result, or an error that names an argument."""

import inspect
from collections.abc import Callable
from typing import Any

import fastok
import pytest
import torch
from fastok import Code, KVFormat, PagedKV, ScoreSpec, flash
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

REFUSALS = (TypeError, ValueError, NotImplementedError)
SMALL = KVFormat(Code(4, "channel"), Code(4, "token"), group=8, page=8, hot=8)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape)


def ints(*values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def attention_arguments() -> dict[str, Any]:
    return {
        "q": draw(2, 3, 4, 16), "k": draw(2, 5, 2, 16), "v": draw(2, 5, 2, 16), "scale": 0.2, "window": (2, 1),
        "softcap": 3.0, "key_bias": draw(2, 5), "cu_seqlens_q": None, "cu_seqlens_k": None, "max_seqlen_q": 3,
        "max_seqlen_k": 5,
    }  # fmt: skip


def packed_arguments() -> dict[str, Any]:
    return {
        "q": draw(6, 4, 16), "k": draw(9, 2, 16), "v": draw(9, 2, 16), "scale": 0.2, "window": (2, 1), "softcap": 3.0,
        "key_bias": draw(4, 9), "cu_seqlens_q": ints(0, 2, 6), "cu_seqlens_k": ints(0, 5, 9), "max_seqlen_q": 4,
        "max_seqlen_k": 5,
    }  # fmt: skip


def without(arguments: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in names}


def decode_dense(q: Any, k: Any, v: Any, seq_lens: Any, **how: Any) -> Any:
    return fastok.attention_decode(q, (k, v, seq_lens), **how)


def decode_pages(q: Any, k_pages: Any, v_pages: Any, block_table: Any, seq_lens: Any, **how: Any) -> Any:
    return fastok.attention_decode(q, PagedKV(k_pages, v_pages, block_table, seq_lens), **how)


def append(k: Any, v: Any) -> Any:
    return fastok.PackedKV(SMALL, 2, 2, 32).append(k, v)


def keep(index: Any) -> Any:
    return fastok.kv_pack(draw(2, 30, 2, 32), draw(2, 30, 2, 32), SMALL).keep(index)


EXTRAS: dict[str, Any] = {"tokens": ints([[0, 2], [1, -1]], [[0, 2], [1, -1]]), "key_bias": draw(2, 8), "scale": 0.1,
                          "softcap": 2.0}  # fmt: skip
FLASH: dict[str, Any] = {"softmax_scale": 0.1, "window_size": (2, 1), "softcap": 2.0}

# Each function with arguments that it takes, made anew for each call.
CALLS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "attention": (fastok.attention, attention_arguments),
    "attention, packed": (fastok.attention, packed_arguments),
    "attention_scores": (
        fastok.attention_scores,
        lambda: attention_arguments() | {"lse": draw(2, 4, 3), "spec": ScoreSpec(value_norm="l1")},
    ),
    "attention_scores, rows": (
        fastok.attention_scores,
        lambda: attention_arguments() | {"spec": ScoreSpec(rows=ints(0, 2, dtype=torch.int64), cols=(1, 4))},
    ),
    "attention_with_scores": (
        fastok.attention_with_scores,
        lambda: attention_arguments() | {"scores": (ScoreSpec(), ScoreSpec(rows="last"))},
    ),
    "attention_with_scores, packed": (
        fastok.attention_with_scores,
        lambda: packed_arguments() | {"scores": (ScoreSpec(), ScoreSpec(rows="last"))},
    ),
    "merge_states": (
        fastok.merge_states,
        lambda: {"out_a": draw(2, 3, 4, 8), "lse_a": draw(2, 4, 3), "out_b": draw(2, 3, 4, 8), "lse_b": draw(2, 4, 3)},
    ),
    "attention_decode": (
        decode_dense,
        lambda: {"q": draw(2, 1, 4, 16), "k": draw(2, 8, 2, 16), "v": draw(2, 8, 2, 24), "seq_lens": ints(8, 5)}
        | EXTRAS,
    ),
    "attention_decode, pages": (
        decode_pages,
        lambda: {
            "q": draw(2, 1, 4, 16), "k_pages": draw(4, 4, 2, 16), "v_pages": draw(4, 4, 2, 16),
            "block_table": ints([0, 3], [2, 1]), "seq_lens": ints(8, 5),
        } | EXTRAS,
    ),
    "attention_decode, packed": (
        fastok.attention_decode,
        lambda: {"q": draw(2, 1, 4, 32), "cache": fastok.kv_pack(draw(2, 8, 2, 32), draw(2, 8, 2, 32), SMALL)}
        | EXTRAS,
    ),
    "kv_pack": (
        fastok.kv_pack,
        lambda: {"k": draw(2, 20, 2, 32), "v": draw(2, 20, 2, 32), "fmt": "kivi-2", "seq_lens": ints(20, 3)},
    ),
    "kv_pack, salient": (
        fastok.kv_pack,
        lambda: {"k": draw(2, 20, 2, 32), "v": draw(2, 20, 2, 32), "fmt": "zipcache-4/2",
                 "salient": torch.ones(2, 2, 20, dtype=torch.bool)},
    ),
    "PackedKV.append": (append, lambda: {"k": draw(2, 3, 2, 32), "v": draw(2, 3, 2, 32)}),
    "PackedKV.keep": (keep, lambda: {"index": ints([[0, 2], [1, -1]], [[0, 2], [1, -1]], dtype=torch.int64)}),
    "flash_attn_func": (
        flash.flash_attn_func,
        lambda: FLASH | without(attention_arguments(), *attention_arguments().keys() - {"q", "k", "v"}),
    ),
    "flash_attn_varlen_func": (
        flash.flash_attn_varlen_func,
        lambda: FLASH | without(packed_arguments(), "scale", "window", "softcap", "key_bias"),
    ),
    "flash_attn_varlen_func, pages": (
        flash.flash_attn_varlen_func,
        lambda: FLASH | without(packed_arguments(), "scale", "window", "softcap", "key_bias")
        | {"k": draw(4, 4, 2, 16), "v": draw(4, 4, 2, 16), "block_table": ints([0, 3], [2, 1])},
    ),
    "flash_attn_with_kvcache": (
        flash.flash_attn_with_kvcache,
        lambda: FLASH | {
            "q": draw(2, 2, 4, 16), "k_cache": draw(3, 9, 2, 16), "v_cache": draw(3, 9, 2, 16), "k": draw(2, 2, 2, 16),
            "v": draw(2, 2, 2, 16), "rotary_cos": draw(9, 4), "rotary_sin": draw(9, 4), "cache_seqlens": ints(3, 7),
            "cache_batch_idx": ints(2, 0),
        },
    ),
    "flash_attn_with_kvcache, pages": (
        flash.flash_attn_with_kvcache,
        lambda: FLASH | {
            "q": draw(2, 2, 4, 16), "k_cache": draw(4, 4, 2, 16), "v_cache": draw(4, 4, 2, 16), "k": draw(2, 2, 2, 16),
            "v": draw(2, 2, 2, 16), "cache_seqlens": ints(3, 6), "block_table": ints([0, 3], [2, 1]),
        },
    ),
    "flash_attn_with_kvcache, padded": (
        flash.flash_attn_with_kvcache,
        lambda: FLASH | {"q": draw(2, 2, 4, 16), "k_cache": draw(2, 9, 2, 16), "v_cache": draw(2, 9, 2, 16),
                         "cache_leftpad": ints(3, 1), "cache_seqlens": 7},
    ),
    "PackedCache": (fastok.PackedCache, lambda: {"fmt": "kivi-2", "model_or_config": None}),
}  # fmt: skip

# What may stand in an argument's place: other kinds of thing, and the right one in a wrong form.
OTHERS: tuple[Any, ...] = (
    None, "text", 2.5, -3, 10**9, True, [1, 2], (1,), (1, 2, 3), ("a", 2), {}, float("nan"), object(),
    torch.zeros(0), torch.tensor(1.0), torch.zeros(3, dtype=torch.int64), torch.zeros(2, 3, 4, 16), ScoreSpec(),
)  # fmt: skip
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "float64": lambda x: x.double(),
    "float16": lambda x: x.half(),
    "int64": lambda x: x.long(),
    "uint8": lambda x: x.to(torch.uint8),
    "bool": lambda x: x.bool(),
    "complex": lambda x: x.to(torch.complex64),
    "meta": lambda x: x.to("meta"),
    "first of a batch": lambda x: x[0],
    "half a batch": lambda x: x[:1],
    "no batch": lambda x: x[:0],
    "narrower": lambda x: x[..., :-1],
    "no width": lambda x: x[..., :0],
    "one more dimension": lambda x: x[None],
    "flat": lambda x: x.flatten(),
    "wider": lambda x: torch.cat([x, x], -1),
    "longer": lambda x: torch.cat([x, x], 0),
    "large": lambda x: x + 1000 if x.dtype != torch.bool else x,
    "negative": lambda x: -x - 1 if x.dtype != torch.bool else x,
}


def names_an_argument(message: str, function: Callable[..., Any], arguments: dict[str, Any]) -> bool:
    names = {*inspect.signature(function).parameters, *arguments, "seq_lens", "window", "rows", "cols"}
    return any(name in message for name in names - {"how", "q", "k", "v"}) or any(
        message.startswith((f"{name} ", f"{name}:")) for name in ("q", "k", "v")
    )


@pytest.mark.parametrize("name", CALLS)
def test_what_is_given_here_is_taken(name: str) -> None:
    function, make = CALLS[name]
    function(**make())


@given(data=st.data())
@pytest.mark.parametrize("name", CALLS)
def test_errors_name_an_argument(name: str, data: st.DataObject) -> None:
    function, make = CALLS[name]
    arguments = make()
    for _ in range(data.draw(st.integers(1, 2))):
        spoilt = data.draw(st.sampled_from(sorted(arguments)))
        value = arguments[spoilt]
        if isinstance(value, Tensor) and data.draw(st.booleans()):
            try:
                arguments[spoilt] = CHANGES[data.draw(st.sampled_from(sorted(CHANGES)))](value)
            except (IndexError, RuntimeError):  # this tensor cannot be changed so
                continue
        else:
            arguments[spoilt] = OTHERS[data.draw(st.integers(0, len(OTHERS) - 1))]
    try:
        with torch.no_grad():
            function(**arguments)
    except REFUSALS as refusal:
        if not names_an_argument(str(refusal), function, arguments):
            raise AssertionError("an error that names no argument") from refusal
