"""The quickstart's command, which users take over, works wherever they are."""

import shlex
import sys

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from verl_m2po.cli.quickstart import Run, printable


@pytest.mark.parametrize("name", ["plain", "josé", "a b(c)", "a=b", "a'b", 'a"b', "[x],y", "$HOME"])
def test_hydra_and_a_shell_read_the_paths_that_were_meant(tmp_path, name):
    out = tmp_path / name
    run = Run(out, steps=3, loss="m2po", seed=1)
    command = run.command(out / "model", out / "data")
    parsed = OverridesParser.create().parse_overrides(command[4:])
    assert not any(each.is_sweep_override() for each in parsed)
    values = {each.key_or_group: each.value() for each in parsed}
    assert values["actor_rollout_ref.model.path"] == str(out / "model")
    assert values["data.train_files"] == str(out / "data" / "train.parquet")
    assert values["data.val_files"] == str(out / "data" / "validation.parquet")
    assert values["hydra.run.dir"] == str(run.folder / "hydra")
    pasted = shlex.split(printable(run, command).replace("\\\n", ""))
    assert pasted == [f"{key}={value}" for key, value in run.environment.items()] + command


def test_an_ordinary_command_has_no_quotes(tmp_path):
    run = Run(tmp_path, steps=3, loss="m2po", seed=1)
    assert "'" not in printable(run, run.command(tmp_path / "model", tmp_path / "data")).replace(sys.executable, "")
