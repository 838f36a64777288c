"""Policy losses. Importing this package registers them with verl."""

from verl_m2po.losses.m2po import m2po_loss
from verl_m2po.losses.m2po_clip import m2po_clip_loss
from verl_m2po.losses.no_trust_region import no_trust_region_loss

__all__ = ["m2po_clip_loss", "m2po_loss", "no_trust_region_loss"]
