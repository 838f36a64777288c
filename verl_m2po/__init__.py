"""Learn from stale rollouts in verl. Importing this package imports neither torch nor verl."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("verl-m2po")
except PackageNotFoundError:  # a source tree that is on sys.path without being installed
    __version__ = "0+unknown"
