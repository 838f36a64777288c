"""One record for each loss: everything that the rest of the package wants to know of it.

Registration, settings, diagnostics, requirements, the actor worker's search and the docs read the records; none of
them names a loss.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from omegaconf import DictConfig
from torch import Tensor
from verl.base_config import BaseConfig
from verl.workers.config import ActorConfig

from verl_m2po.ground.problem import Problem
from verl_m2po.losses.kernel.mini_batch import Search
from verl_m2po.losses.kernel.needs import Need
from verl_m2po.losses.kernel.settings import settings_of
from verl_m2po.losses.kernel.tokens import Tokens


class Call(NamedTuple):
    """The arguments with which verl calls a loss; tensors are [batch, response]."""

    old_log_prob: Tensor
    log_prob: Tensor
    advantages: Tensor
    response_mask: Tensor
    loss_agg_mode: str
    config: ActorConfig
    rollout_is_weights: Tensor | None


class TokenLoss(NamedTuple):
    """What a rule makes of `Tokens`; all [batch, response], anything outside their mask.

    Args:
        value: Loss of each token.
        derivative: Its derivative with respect to the token's log-prob. The very tensor `value` says that the two are
            equal, and that a token which is not kept has no value either.
        keep: bool; tokens to which the rule leaves a gradient (which may be 0 for another reason: advantage 0).
        metrics: Metrics of the family, by their full names.
        region: The trust region that decided, for the diagnostics; None for a rule without one.
    """

    value: Tensor
    derivative: Tensor
    keep: Tensor
    metrics: dict[str, Any] | None = None
    region: Any = None


@dataclass(frozen=True)
class Decision:
    """What decides over all tokens of the optimizer mini-batch, not token by token.

    The settings of such a loss have a field `scope`, "mini_batch" or "micro_batch"; without one each micro-batch
    decides for itself.

    Args:
        search: (settings, mismatch floor) to what sees tokens with `add` and decides with `solve`. The floor, the
            second moment of tokens of age zero, is 0 unless `subtracts_floor`.
        subtracts_floor: Whether these settings ask for the mismatch floor, which needs the ages of the rows.
    """

    search: Callable[[Any, float], Search]
    subtracts_floor: Callable[[Any], bool] = lambda _settings: False

    def scope(self, settings: Any) -> str:
        """Tokens that decide together, one of `mini_batch.SCOPES`."""
        return getattr(settings, "scope", "micro_batch")


def _no_problems(_config: DictConfig) -> Iterator[Problem]:
    yield from ()


def _accepts_all(_call: Call) -> None:
    return None


@dataclass(frozen=True)
class Loss:
    """One loss. Either `rule` or `around` is set.

    Args:
        name: Its registered name, that of its file and of its settings' key.
        summary: What it is, in one line, for docs and messages.
        rule: (tokens, settings) to `TokenLoss`; with a `decision`, what it found comes third. It sees whole responses,
            but not all of a micro-batch at once: whatever depends on other responses is a `decision`.
        around: (call, settings) to loss and metrics, for a loss that wraps another one of verl's registry.
        settings: Class of `policy_loss.<name>`; None: there is nothing to set.
        decision: What decides over the mini-batch; None: each token for itself.
        needs: What it needs of the rest of the config.
        problems: Of a config, beyond `needs`.
        presets: Options of the group `loss` that select it.
        accepts: Raises for a call that the loss cannot honour.
        behaviour_log_ratio: log of current over behaviour policy, finite on the mask of the tokens; None: their
            `log_ratio`.
        weights_in_rule: The rule makes use of the rollout correction weights itself; otherwise they multiply each
            token.
        averaging_decay: (settings) to the decay of an average over the weights of past updates; the rule then finds the
            log-probs under that average in the tokens. None: it has no use for them.
        masks_sequences_first: The rule sees only what sequence masking leaves. Otherwise masked tokens still have a
            say in statistics of the batch.
    """

    name: str
    summary: str
    rule: Callable[..., TokenLoss] | None = None
    around: Callable[[Call, Any], tuple[Tensor, dict[str, Any]]] | None = None
    settings: type[BaseConfig] | None = None
    decision: Decision | None = None
    needs: tuple[Need, ...] = ()
    problems: Callable[[DictConfig], Iterator[Problem]] = _no_problems
    presets: tuple[str, ...] = ()
    accepts: Callable[[Call], None] = _accepts_all
    behaviour_log_ratio: Callable[[Tokens], Tensor] | None = None
    weights_in_rule: bool = False
    averaging_decay: Callable[[Any], float] | None = None
    masks_sequences_first: bool = False
    module: str = field(init=False, default="")

    def __post_init__(self):
        if (self.rule is None) == (self.around is None):
            raise ValueError(f"The loss {self.name} needs one of `rule` and `around`.")
        object.__setattr__(self, "module", (self.rule or self.around).__module__)

    @property
    def leaves_sums(self) -> bool:
        """Whether it leaves its sums for the diagnostics itself."""
        return self.rule is not None

    def behaviour(self, tokens: Tokens) -> Tokens:
        """`tokens` with their ratio to the behaviour policy."""
        if self.behaviour_log_ratio is None:
            return tokens
        return dataclasses.replace(tokens, log_ratio=self.behaviour_log_ratio(tokens), is_ordinary=False)

    def settings_in(self, config: ActorConfig) -> Any:
        """Its settings in verl's actor settings; None where it has none."""
        return None if self.settings is None else settings_of(config, self.name, self.settings)

    def decides_over_mini_batch(self, config: ActorConfig) -> bool:
        """Whether `config` lets it decide by a statistic of all tokens of the optimizer mini-batch."""
        return self.decision is not None and self.decision.scope(self.settings_in(config)) == "mini_batch"
