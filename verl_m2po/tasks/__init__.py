"""Data and base models: a task that needs no download, the public sets as verl wants them, and who scores answers."""
