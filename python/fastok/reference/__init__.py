"""The specification of every op: short, plain PyTorch that runs anywhere and that all backends are tested against.

Functions with a public counterpart (``bipartite_match``, ``attention``) take the same arguments; the others mirror
``torch.ops.fastok.<name>``. What ops mirror uses no other part of fastok; `functions` are the public functions' own
argument checks, and types of results, over that.
"""

from .attention import merge_states
from .functions import (
    attention,
    attention_decode,
    attention_scores,
    attention_with_scores,
    calibrate_channels,
    double_sparse_decode,
    kv_pack,
    label_scores,
    rotary_channels,
    select_tokens,
    semantic_tokens,
)
from .k_center import k_center, k_center_picks
from .match import bipartite_match, match_map, nearest, nearest_rows
from .max_coverage import max_coverage, max_coverage_picks
from .merge import build_map, merge, merge_backward, unmerge
from .select import density_peaks, peak_rows, sample_cdf, sample_map, top_rows, top_tokens

__all__ = [
    "attention",
    "attention_decode",
    "attention_scores",
    "attention_with_scores",
    "bipartite_match",
    "build_map",
    "calibrate_channels",
    "density_peaks",
    "double_sparse_decode",
    "k_center",
    "k_center_picks",
    "kv_pack",
    "label_scores",
    "match_map",
    "max_coverage",
    "max_coverage_picks",
    "merge",
    "merge_backward",
    "merge_states",
    "nearest",
    "nearest_rows",
    "peak_rows",
    "rotary_channels",
    "sample_cdf",
    "sample_map",
    "select_tokens",
    "semantic_tokens",
    "top_rows",
    "top_tokens",
    "unmerge",
]
