"""The actor worker: it decides over a whole optimizer mini-batch before verl trains on it, and observes what it did.

Guarantee: one decision for all micro-batches of all ranks, the same whatever they are.
"""
