"""What ends a run: a process that died, a request to stop.

Guarantee: nothing waits for ever for what cannot come.
"""
