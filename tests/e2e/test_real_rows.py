"""Real questions: GSM8K's prompts, lengths and verl's own reward function, with a model that cannot answer one."""

import math
from pathlib import Path

import cpu_run
import pytest

from verl_m2po.tasks.prepare import prepare

pytestmark = [pytest.mark.e2e, pytest.mark.workload, pytest.mark.timeout(900)]

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"


@pytest.mark.skipif(not GSM8K.is_dir(), reason="needs GSM8K's rows beside the repository")
def test_gsm8k_goes_through(tmp_path: Path, tiny: Path):
    prepare("gsm8k", tmp_path / "gsm8k", source=GSM8K)
    result = cpu_run.run_main(
        tmp_path / "run",
        f"actor_rollout_ref.model.path={tiny}",
        f"data.train_files={tmp_path / 'gsm8k' / 'train.parquet'}",
        f"data.val_files={tmp_path / 'gsm8k' / 'test.parquet'}",
        config_name="gsm8k_smoke",
    )
    assert result.status == 0, result.tail
    assert len(result.series("actor/loss")) == 3
    assert all(math.isfinite(value) for value in result.series("actor/loss") + result.series("actor/grad_norm"))
    assert result.series("critic/score/mean") == [0.0] * 3, "the tiny model has never seen a word problem"
    assert max(result.series("prompt_length/mean")) > 200, "real questions are long"
