"""The command `verl-m2po`: a file for each of its commands that is not a room of its own."""
