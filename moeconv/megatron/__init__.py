"""Megatron-Core's checkpoint formats: names and rectangles of the same global tensors, read and written without Megatron or torch."""
