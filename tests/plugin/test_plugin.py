"""Installing is enough, and what cannot register says so. Every check runs in a process of its own."""

import json
import os
import subprocess
import sys

import pytest

from verl_m2po.plugin import EXTENSIONS

pytestmark = pytest.mark.slow


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=600
    )


def test_importing_the_package_imports_neither_torch_nor_verl():
    done = python("import verl_m2po, sys; print(sorted({'torch', 'verl'} & set(sys.modules)), verl_m2po.__version__)")
    assert done.stdout.startswith("[]"), done.stdout


def test_importing_verl_imports_only_the_table():
    """Registration costs nothing until verl imports the module that we register with."""
    done = python("import verl, sys; print(sorted(name for name in sys.modules if name.startswith('verl_m2po.')))")
    loaded = done.stdout.strip().splitlines()[-1]
    assert "verl_m2po.plugin" in loaded
    for heavy in ("verl_m2po.losses", "verl_m2po.actor.worker", "verl_m2po.staleness", "verl_m2po.report"):
        assert heavy not in loaded


def test_everything_is_registered_after_import_verl():
    """One process, no import of ours in "user code": each name of the table is in verl's registry, from our module."""
    code = (
        "import verl\n"
        "from verl_m2po import plugin\nfrom verl_m2po.cli import registries\n"
        "import json; print(json.dumps({e.what: registries.origins(e) for e in plugin.EXTENSIONS}))"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert set(found) == {extension.what for extension in EXTENSIONS}
    for origins in found.values():
        assert origins, "a row that promises nothing cannot be checked"
        assert all(origin and origin.startswith("verl_m2po.") for origin in origins.values()), origins


def test_a_failure_to_register_is_loud():
    """The error reaches whoever imports verl's module, and is logged at ERROR with the row and the reason."""
    done = python("import sys; sys.modules['verl_m2po.losses'] = None; import verl.trainer.ppo.core_algos")
    assert done.returncode != 0
    assert "ERROR" in done.stderr
    assert "verl-m2po could not register its policy loss with verl.trainer.ppo.core_algos: ModuleNotFoundError" in (
        done.stderr
    )


def test_a_failure_during_import_verl_is_loud_and_stops_no_other_row():
    """verl swallows the exception here (its platform module is imported before plugins are), so the log must say it."""
    done = python(
        "import sys; sys.modules['verl_m2po.cpu.platform'] = None; import verl.trainer.ppo.core_algos as c\n"
        "print('m2po' in c.POLICY_LOSS_REGISTRY)"
    )
    assert "verl-m2po could not register its platform" in done.stderr
    assert done.stdout.strip().splitlines()[-1] == "True"


def test_registering_twice_registers_once():
    code = (
        "import verl, importlib, sys\n"
        "from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY as registry\n"
        "from verl_m2po import plugin\n"
        "before = dict(registry)\n"
        "plugin.install_all()\n"
        "importlib.import_module('verl.workers.engine_workers')\n"
        "print(before == registry)"
    )
    done = python(code)
    assert done.stdout.strip().splitlines()[-1] == "True", done.stderr
