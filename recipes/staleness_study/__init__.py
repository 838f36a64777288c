"""The staleness study: which runs, in which order, and what docs/results.md makes of them."""
