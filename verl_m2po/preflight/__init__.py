"""Everything that can be known to be wrong with a run before Ray starts, said at once and in one place."""
