from dataclasses import dataclass

from verl.workers.config import PolicyLossConfig


@dataclass
class M2POPolicyLossConfig(PolicyLossConfig):
    selected: str | None = None

    def __post_init__(self):
        if self.selected:
            object.__setattr__(self, "loss_mode", self.selected)
