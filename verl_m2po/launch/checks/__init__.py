"""What can be known to be wrong with a run before Ray starts. Each file asks one question of the config."""
