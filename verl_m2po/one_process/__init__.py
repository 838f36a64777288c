"""An experiment bench: train on stale data in one process, without Ray, at about a tenth of a second a step.

The losses, the trust region, the advantages, the staleness rule and the metrics are those of a run through verl, by the
same calls; only what moves data and weights between processes is left out, and transformers generates in vLLM's place.
"""
