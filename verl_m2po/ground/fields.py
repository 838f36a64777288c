"""Names of fields that travel with the data between rooms."""

AGE_FIELD = "age_updates"
"""int [batch], optional: optimizer updates between the weights that generated a row and those with which its
`train_mini_batch` starts. The trainer modes write it into TransferQueue, the actor worker reads it."""
