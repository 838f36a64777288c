"""What goes on when a rollout server dies: its work moves to the others, and a new one takes its place.

Guarantee: a server that does not report the weight version that it should serve gets no work.
"""
