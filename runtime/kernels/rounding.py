"""What stochastic roundings are drawn with, the same with and without a kernel."""


def rounding_seed(step: int) -> int:
    """Give the seed of a step's roundings, 31 bits.

    Args:
        step: number of the update.
    """
    return (step * 0x9E3779B1) & 0x7FFFFFFF
