"""Decode attention as PyTorch can do it: three formulations of the same grouped-query attention of one token."""

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def enable_gqa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``q[B,1,H,D]``, ``k, v [B,G,T,D]``."""
    return scaled_dot_product_attention(q.transpose(1, 2), k, v, enable_gqa=True)


def group_as_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The query heads of a group are the query rows of its KV head."""
    return scaled_dot_product_attention(q[:, 0].unflatten(1, (k.shape[1], -1)), k, v)


def grouped_matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two batched products and a softmax in fp32."""
    rows = q[:, 0].unflatten(1, (k.shape[1], -1))
    logits = (rows @ k.mT).float() * q.shape[-1] ** -0.5
    return logits.softmax(-1).to(v.dtype) @ v


FORMULATIONS = {"SDPA enable_gqa": enable_gqa, "SDPA, group as rows": group_as_rows, "grouped matmul": grouped_matmul}


def fastest(q: Tensor, k: Tensor, v: Tensor, interleaved) -> str:
    """The name of the formulation that takes least time here."""
    times = interleaved([[lambda f=f: f(q, k, v)] for f in FORMULATIONS.values()], q.device, 3.0)
    return min(zip(times, FORMULATIONS, strict=True))[1]
