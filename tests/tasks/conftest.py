"""Settings for this folder's property tests."""

from hypothesis import settings

# The same examples in every run, and no time limit: the machines that tests share are not always idle.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")
