"""From logs to numbers: reads what is there, and draws nothing."""
