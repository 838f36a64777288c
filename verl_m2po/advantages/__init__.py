"""Advantage estimators. Importing this package registers them with verl."""

from verl_m2po.advantages.asymre import AsymREConfig, asymre_advantage
from verl_m2po.advantages.max_at_k import MaxAtKConfig, max_at_k_advantage
from verl_m2po.advantages.oapl import OAPLAdvantageConfig, oapl_advantage
from verl_m2po.advantages.red import REDDropConfig, REDWeightConfig, red_drop_advantage, red_weight_advantage

SETTINGS: dict[str, type] = {
    "oapl": OAPLAdvantageConfig,
    "asymre": AsymREConfig,
    "red_drop": REDDropConfig,
    "red_weight": REDWeightConfig,
    "max_at_k": MaxAtKConfig,
}
"""Settings of each estimator, under `algorithm.<its name>`."""

__all__ = [
    "SETTINGS",
    "asymre_advantage",
    "max_at_k_advantage",
    "oapl_advantage",
    "red_drop_advantage",
    "red_weight_advantage",
]
