"""How stale should a run be, and how many devices should generate: simulated before any device is paid for.

Guarantee: what may start, and what is trained, is decided by the rules of the trainer modes themselves. No torch, Ray.
"""
