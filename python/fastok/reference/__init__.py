"""The specification of every op: short, plain PyTorch that runs anywhere and that all backends are tested against.

Functions with a public counterpart (``bipartite_match``, ``top_tokens``) take the same arguments; the others mirror
``torch.ops.fastok.<name>``. Nothing here uses another part of fastok, except the type ``TokenMap`` that results have.
"""

from .k_center import k_center, k_center_picks
from .match import bipartite_match, match_map, nearest, nearest_rows
from .max_coverage import max_coverage, max_coverage_picks
from .merge import build_map, merge, merge_backward, unmerge
from .select import density_peaks, peak_rows, sample_cdf, sample_map, top_rows, top_tokens

__all__ = [
    "bipartite_match",
    "build_map",
    "density_peaks",
    "k_center",
    "k_center_picks",
    "match_map",
    "max_coverage",
    "max_coverage_picks",
    "merge",
    "merge_backward",
    "nearest",
    "nearest_rows",
    "peak_rows",
    "sample_cdf",
    "sample_map",
    "top_rows",
    "top_tokens",
    "unmerge",
]
