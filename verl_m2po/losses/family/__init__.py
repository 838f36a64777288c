"""One file for each registered loss: its rule, its settings, what it needs; `kernel.registry` finds these files."""
