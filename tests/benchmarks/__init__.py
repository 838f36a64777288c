"""What the losses cost, side by side with verl's own and with the authors' loop: `python -m benchmarks`."""
