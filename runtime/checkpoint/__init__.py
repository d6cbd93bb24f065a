"""Checkpoints of a run: ordinary sharded folders with the optimizer's state, written while training goes on."""
