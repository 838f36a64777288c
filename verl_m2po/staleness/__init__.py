"""How old the training data is.

`rule` decides it, `buffer.py` and `trainer.py` carry it out in verl; the other rooms serve these two.
"""
