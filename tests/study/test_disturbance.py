"""The disturbed learning rate, and what is read of the disturbed runs."""

import json
from itertools import pairwise

import torch

from staleness_study.disturbance import Run, Schedule
from staleness_study.disturbance_verl import KEPT_OF_VERL, moves, read
from staleness_study.disturbed import DisturbedAdamW


def test_the_learning_rate_is_larger_in_the_disturbed_updates_only():
    def moved(make) -> list[float]:
        weight = torch.nn.Parameter(torch.zeros(1))
        optimizer, places = make([weight]), [0.0]
        for _ in range(6):
            weight.grad = torch.ones(1)
            optimizer.step()
            places.append(weight.item())
        return [b - a for a, b in pairwise(places)]

    settings = {"lr": 1e-3, "weight_decay": 0.0}
    plain = moved(lambda params: torch.optim.AdamW(params, **settings))
    disturbed = moved(lambda params: DisturbedAdamW(params, begins=2, ends=4, factor=10.0, **settings))
    factors = [b / a for a, b in zip(plain, disturbed, strict=True)]
    torch.testing.assert_close(torch.tensor(factors), torch.tensor([1.0, 1, 10, 10, 1, 1]), rtol=1e-3, atol=0)


def test_a_log_of_verl_becomes_a_run_and_says_when_the_bound_moved(tmp_path):
    rows = [
        {
            "staleness/bound_updates": 16.0,
            "actor/m2po/masked_fraction": 0.02,
            "staleness/bound_lowered_by_masking": 1.0,
        },
        {"staleness/bound_updates": 8.0, "val-core/arithmetic/acc/mean@1": 0.5, "staleness/bound_raised": 1.0},
    ]
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"step": i, "data": row}) + "\n" for i, row in enumerate(rows, 1)))
    run = read("adaptive", 1, log)
    assert set(run.series) == set(KEPT_OF_VERL)
    assert run.series["bound_updates"] == [16.0, 8.0]
    assert run.series["masked"] == [0.02, 0.0]
    assert run.accuracy == {2: 0.5}
    told = moves(run, Schedule(steps=2, begins=1, ends=2))
    assert "lowered, too much masked after 1; lowered, second moment above its target after no step" in told
    assert "raised after 2. The bound from step 1 on: 16 8." in told
    assert isinstance(run, Run)
