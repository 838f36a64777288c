"""Policy losses. Importing this package registers them with verl."""

from verl_m2po.losses.family.bapo import bapo_loss
from verl_m2po.losses.family.decoupled_loglinear import decoupled_loglinear_loss
from verl_m2po.losses.family.m2po import m2po_loss
from verl_m2po.losses.family.m2po_clip import m2po_clip_loss
from verl_m2po.losses.family.mix_ppg import mix_ppg_loss
from verl_m2po.losses.family.no_trust_region import no_trust_region_loss
from verl_m2po.losses.family.oapl import oapl_loss
from verl_m2po.losses.family.opsm import opsm_loss
from verl_m2po.losses.family.rec import rec_loss
from verl_m2po.losses.family.topr import topr_loss

__all__ = [
    "bapo_loss",
    "decoupled_loglinear_loss",
    "m2po_clip_loss",
    "m2po_loss",
    "mix_ppg_loss",
    "no_trust_region_loss",
    "oapl_loss",
    "opsm_loss",
    "rec_loss",
    "topr_loss",
]
