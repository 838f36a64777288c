"""A virtual environment as a user has one: verl and what it needs, and of this package the wheel alone."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

# This environment's own install of the package (an editable one leaves a .pth file), which must not be seen.
_OURS = ("verl_m2po", "_editable_impl_verl_m2po", "__editable__")


class UserEnvironment:
    """A virtual environment in `folder`, outside the repository.

    Its site-packages are links to this environment's, so it takes a second and no network.
    """

    def __init__(self, folder: Path) -> None:
        venv.create(folder / "env", symlinks=True)
        self.python = folder / "env" / "bin" / "python"
        self.home = folder / "home"
        self.home.mkdir()
        ours = Path(sysconfig.get_path("purelib"))
        theirs = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "env")}))
        for entry in ours.iterdir():
            if not entry.name.startswith(_OURS):
                (theirs / entry.name).symlink_to(entry)

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables of its processes: a home of its own, and no way back to the repository."""
        kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        return {**kept, "HOME": str(self.home), "PATH": f"{self.python.parent}{os.pathsep}{os.environ['PATH']}"}

    def run(self, *command: str) -> str:
        """What `command` prints, run from its home; fails with what it says on stderr."""
        return run(*command, cwd=self.home, env=self.variables)

    def pip(self, *arguments: str) -> str:
        """Run pip without an index: whatever is missing is an error."""
        return self.run("python", "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments)


def run(*command: str, cwd: Path, env: dict[str, str] | None = None) -> str:
    """What `command` prints; fails with what it says on stderr."""
    process = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600, env=env)
    assert process.returncode == 0, f"{command}\n{process.stdout[-2000:]}{process.stderr[-4000:]}"
    return process.stdout


def build_wheel(repository: Path, out: Path) -> Path:
    """Build the wheel of `repository` into `out` with this environment's tools."""
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), cwd=repository)
    (path,) = out.glob("*.whl")
    return path
