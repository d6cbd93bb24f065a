"""Megatron-Core checkpoint formats: more names for the same rectangles, read and written without Megatron or torch."""
