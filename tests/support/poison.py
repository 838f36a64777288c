"""A prompt that kills: the engine that is given it ends at once, as with a bug of a kernel that one input sets off."""

import os
import signal

from transformers import AutoTokenizer
from vllm.v1.sample.logits_processor import BatchUpdate

from benchmarks.paced.token_time import TokenTime


class Poison(TokenTime):
    """A logits processor, by engine_kwargs.vllm.logits_processors; as `TokenTime` besides."""

    def __init__(self, vllm_config, device, is_pin_memory) -> None:
        super().__init__(vllm_config, device, is_pin_memory)
        self._tokenizer = AutoTokenizer.from_pretrained(vllm_config.model_config.tokenizer)
        self._question = os.environ["M2PO_TEST_POISONED_QUESTION"]

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """vLLM tells what joins the batch; it has been decoded once then, so a first token may have been sent."""
        for _, _, prompt, _ in batch_update.added if batch_update else ():
            if self._question in self._tokenizer.decode(prompt):
                os.kill(os.getpid(), signal.SIGKILL)
