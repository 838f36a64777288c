"""Rollouts as verl's trainer gets them: tokens, behaviour log-probs and rewards, one group for each prompt."""

# transformers and TensorDict annotate wider, or narrower, types than they return.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor
from transformers import Cache, PreTrainedTokenizerBase, Qwen2ForCausalLM
from verl import DataProto
from verl.trainer.ppo.ray_trainer import compute_advantage
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_add_to_batch

from verl_m2po.one_process.roomy_cache import with_room
from verl_m2po.one_process.setup import Setup
from verl_m2po.tasks import supervision
from verl_m2po.tasks.task import Task


@dataclass(frozen=True)
class Problems:
    """Prompts of one length, with the responses that earn the reward.

    Args:
        prompts: int64 [problems, prompt].
        answers: int64 [problems, response], `supervision.NO_TOKEN` after the end of the turn.
        right: The right responses as text.
        task: What they are problems of.
    """

    prompts: Tensor
    answers: Tensor
    right: list[str]
    task: Task

    @classmethod
    def make(
        cls, tokenizer: PreTrainedTokenizerBase, task: Task, count: int, split: str, digits: int, seed: int = 0
    ) -> "Problems":
        """The first `count` problems of `task`, which are also the first rows of its data files."""
        prompts, answers = supervision.encode_problems(
            tokenizer, count, split=split, digits=digits, seed=seed, task=task
        )
        problems = (task.problem(index, split=split, digits=digits, seed=seed) for index in range(count))
        return cls(prompts, answers, [right for _, right in problems], task)

    def order(self, seed: int) -> Iterator[int]:
        """Indices of problems without end, each epoch shuffled anew."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield from torch.randperm(len(self.right), generator=generator).tolist()


class Generator:
    """Samples responses with transformers and scores them with the task's reward.

    Args:
        model: The policy; its present weights are the behaviour policy of what is generated.
        tokenizer: Of the model.
        problems: Prompts to choose from.
        setup: Responses per prompt and temperature.
    """

    def __init__(
        self, model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, problems: Problems, setup: Setup
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._problems = problems
        self._responses = setup.responses
        self._temperature = setup.config.actor_rollout_ref.rollout.temperature
        self._end = tokenizer.eos_token_id

    @torch.no_grad()
    def generate(self, indices: list[int]) -> list[TensorDict]:
        """One group of responses for each problem of `indices`, with rewards and behaviour log-probs.

        Returns:
            For each problem the fields of verl's batches, [responses, ...]: prompts, responses, attention_mask,
            response_mask, rollout_log_probs, rm_scores (on the last token).
        """
        prompts = self._problems.prompts[indices]
        length = prompts.shape[1]
        longest = self._problems.answers.shape[1]
        # One more for the last token of the prompt.
        cache = with_room(prompt_cache(self._model, prompts, self._responses), longest + 1)
        repeated = prompts.repeat_interleave(self._responses, dim=0)
        output = self._model.generate(
            input_ids=repeated,
            attention_mask=torch.ones_like(repeated),
            past_key_values=cache,
            max_new_tokens=longest,
            do_sample=True,
            temperature=self._temperature,
            top_k=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        responses = output.sequences[:, length:]
        logits = torch.stack(output.logits, dim=1) / self._temperature
        log_probs = logits.log_softmax(-1).gather(-1, responses[..., None]).squeeze(-1)
        mask = _until_end(responses, self._end)
        batch = TensorDict(
            {
                "prompts": output.sequences[:, :length],
                "responses": responses,
                # Tokens after the end of the turn change nothing before them, so that all rows can be of one length.
                "attention_mask": torch.ones_like(output.sequences),
                "response_mask": mask,
                "rollout_log_probs": log_probs * mask,
                "rm_scores": self._scores(responses, mask, indices),
            },
            batch_size=len(responses),
        )
        return list(batch.split(self._responses))

    def _scores(self, responses: Tensor, mask: Tensor, indices: list[int]) -> Tensor:
        texts = self._tokenizer.batch_decode(responses.masked_fill(~mask, self._end), skip_special_tokens=True)
        truths = [self._problems.right[index] for index in indices for _ in range(self._responses)]
        task = self._problems.task
        rewards = [task.score(task.data_source, text, truth) for text, truth in zip(texts, truths, strict=True)]
        scores = torch.zeros(responses.shape)
        scores[torch.arange(len(scores)), mask.sum(-1) - 1] = torch.tensor(rewards)
        return scores


def prompt_cache(model: Qwen2ForCausalLM, prompts: Tensor, responses: int) -> Cache:
    """Keys and values of all prompt tokens but the last, computed once for each prompt and repeated for its responses.

    Args:
        model: With or without gradient, as the caller has it.
        prompts: int64 [prompts, prompt].
        responses: Responses of each prompt, which follow each other.
    """
    cache = model.model(input_ids=prompts[:, :-1], use_cache=True).past_key_values
    assert cache is not None
    cache.batch_repeat_interleave(responses)
    return cache


def _until_end(responses: Tensor, end: int) -> Tensor:
    """bool [rows, response]: tokens up to the end of the turn, that one included."""
    ended_before = (responses == end).cumsum(-1) - (responses == end).long()
    return ended_before == 0


def _of_one_length(groups: list[TensorDict]) -> list[TensorDict]:
    """`groups` as long as the longest; where all responses of a call ended early, its groups are shorter."""
    longest = max(group["responses"].shape[1] for group in groups)
    return [_padded(group, longest - group["responses"].shape[1]) for group in groups]


def _padded(group: TensorDict, more: int) -> TensorDict:
    if not more:
        return group
    # What stands there is masked, and comes after all that is not.
    with_response = [name for name, value in group.items() if name != "prompts" and value.dim() > 1]
    longer = {name: F.pad(group[name], (0, more), value=name == "attention_mask") for name in with_response}
    return TensorDict({**dict(group.items()), **longer}, batch_size=group.batch_size)


def with_advantages(
    groups: list[TensorDict], setup: Setup, proximal_log_probs: Callable[[TensorDict], Tensor]
) -> DataProto:
    """The batch of `groups` as verl's trainer hands it to the actor, by verl's own functions.

    Args:
        groups: Fields as `Generator.generate` gives them.
        setup: Which advantages, and whether there is a proximal policy.
        proximal_log_probs: Log-probs of the responses, [rows, response], with the weights at the start of the step.

    Returns:
        The batch; its metrics, those of the rollout correction, are in `meta_info`.
    """
    batch = torch.cat(_of_one_length(groups))
    uids = np.repeat([str(i) for i in range(len(groups))], [len(group) for group in groups])
    data = DataProto(batch=batch, non_tensor_batch={"uid": uids.astype(object)})
    data.batch["token_level_scores"] = data.batch["token_level_rewards"] = data.batch["rm_scores"]
    algorithm, metrics = setup.config.algorithm, {}
    if setup.has_proximal_policy:
        data.batch["old_log_probs"] = proximal_log_probs(data.batch) * data.batch["response_mask"]
        data, metrics = compute_rollout_correction_and_add_to_batch(data, algorithm.rollout_correction)
    else:
        data.batch["old_log_probs"] = data.batch["rollout_log_probs"]
    data.meta_info["metrics"] = metrics
    return compute_advantage(
        data,
        adv_estimator=algorithm.adv_estimator,
        gamma=algorithm.gamma,
        lam=algorithm.lam,
        num_repeat=setup.responses,
        norm_adv_by_std_in_grpo=algorithm.get("norm_adv_by_std_in_grpo", True),
        config=algorithm,
    )
