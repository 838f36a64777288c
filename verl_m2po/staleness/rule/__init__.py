"""Pure rules: which rollouts may be started, trained on, given up, and the clocks that age is counted by.

Guarantee: no trained token is older than was asked. No torch, Ray or TransferQueue here.
"""
