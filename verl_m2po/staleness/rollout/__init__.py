"""What runs in, or talks to, the generating processes.

Guarantee: every row arrives with the weight version of each of its tokens, or not at all.
"""
