"""What outlives a process: checkpoints, the journal, and the way back from them.

Guarantee: a checkpoint is whole or absent, and no rollout is trained twice or lost.
"""
