"""A frozen base held in few bits: formats, the weights that modules compute with, and how they are loaded."""
