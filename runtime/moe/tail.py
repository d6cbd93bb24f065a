"""The room behind a row that travels to its expert."""

TAIL = 16
"""Elements, of which the first bytes are the row's routing weight: 32 bytes in bf16, so that kernels which know a row's
pitch to be a multiple of 16 copy 16 bytes at a time."""
