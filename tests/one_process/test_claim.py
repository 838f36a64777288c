"""Two runs do not write into one folder at once, and a folder that cannot be written to is named before the work."""

import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from verl_m2po.cli.main import app
from verl_m2po.one_process.claim import FolderInUse, claim

HOLD = """
import sys
from pathlib import Path
from verl_m2po.one_process.claim import claim
with claim(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_one_process_at_a_time_and_the_other_is_named(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        message = rf"run is being written by process {process.pid}: .*experiment_name"
        with pytest.raises(FolderInUse, match=message), claim(tmp_path / "run"):
            pass
        with claim(tmp_path / "another run"):
            pass
    with claim(tmp_path / "run"):
        assert (tmp_path / "run" / ".running").read_text() == str(os.getpid())


def test_the_folder_of_a_run_that_was_killed_is_free(tmp_path):
    code = "import os, sys; from pathlib import Path; from verl_m2po.one_process.claim import claim\n"
    code += "with claim(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], timeout=60).returncode == -9
    with claim(tmp_path / "run"):
        pass


def test_an_out_below_a_file_is_one_line(tmp_path):
    (tmp_path / "file").write_text("mine")
    refused = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["try", "loss=m2po", "--out", str(tmp_path / "file" / "x")])
    assert refused.exit_code == 2 and "which is no folder: choose another" in refused.output
