"""Advantage estimators. Importing this package registers them with verl."""

from verl_m2po.advantages.asymre import asymre_advantage
from verl_m2po.advantages.max_at_k import max_at_k_advantage
from verl_m2po.advantages.oapl import oapl_advantage
from verl_m2po.advantages.red import red_drop_advantage, red_weight_advantage

__all__ = [
    "asymre_advantage",
    "max_at_k_advantage",
    "oapl_advantage",
    "red_drop_advantage",
    "red_weight_advantage",
]
