"""What Hydra finds of ours: the overlay of verl's configs, the groups (`loss=`, `staleness=`, ...) and the recipes."""
