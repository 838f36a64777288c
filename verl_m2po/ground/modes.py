"""Names of the trainer modes that this package adds to verl, for processes that must not import trainers."""

MODES = ("stale_k", "stale_k_separate", "bounded_async", "replay")
