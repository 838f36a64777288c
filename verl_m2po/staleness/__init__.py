"""How old the training data is: units, rules, the buffer around TransferQueue, and verl's trainer modes."""
