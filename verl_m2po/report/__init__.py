"""Read the logs of verl runs, whoever made them, and show what staleness did to them.

This room imports none of the others but the ground, nor torch nor verl; matplotlib and Jinja2 only where something is
drawn (extra ``report``).
"""
