"""What every room may use, and what imports nothing of this package."""
