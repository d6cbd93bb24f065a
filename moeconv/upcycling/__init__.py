"""Dense checkpoints into mixtures of experts: which bytes go where, and what is done to them on the way."""
