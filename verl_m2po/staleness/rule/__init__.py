"""Pure rules: which rollouts may be started, trained on or given up; and the clocks by which age is counted.

Guarantee: no trained token is older than the run asked for. No torch, Ray or TransferQueue here.
"""
