"""How trajectories lie in TransferQueue while they wait.

Guarantee: the cost of a trainer step does not depend on how many wait.
"""
