"""Algorithm 1 of M2PO (arXiv:2510.01161) in pure torch: which tokens keep their gradient. No verl, no config.

Guarantee: the decision is exact over all tokens of all ranks, whatever the order of the tokens.
"""

from verl_m2po.second_moment.rule import check_tokens, keep_mask, trust_region_magnitude
from verl_m2po.second_moment.search import (
    TrustRegion,
    TrustRegionSearch,
    check_threshold,
    chunk_size,
    find_trust_region,
    on_host,
)

__all__ = [
    "TrustRegion",
    "TrustRegionSearch",
    "check_threshold",
    "check_tokens",
    "chunk_size",
    "find_trust_region",
    "keep_mask",
    "on_host",
    "trust_region_magnitude",
]
