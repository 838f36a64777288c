"""What losses are made of: tokens, masks, aggregation, diagnostics, the mini-batch. No loss is named here."""
