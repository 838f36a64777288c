"""What is told of a run, and never decides anything: metrics and the ledger."""
