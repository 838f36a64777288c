"""Read the logs of verl runs, whoever made them, and show what staleness did to them.

This room imports none of the others, nor torch nor verl; matplotlib only where a figure is drawn (extra ``report``).
"""
