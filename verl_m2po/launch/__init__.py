"""Everything on the driver around a job: checks before it, signals during it, what a sweep leaves.

Guarantee: what can be known to be wrong before Ray starts is said before Ray starts, all at once.
"""
