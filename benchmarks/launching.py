"""The environment of launches by torchrun that a benchmark makes, itself perhaps launched by torchrun."""

from __future__ import annotations

import os

_LAUNCHER = ("RANK", "LOCAL_", "GROUP_", "ROLE_", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_")
_NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}


def launch_environment(threads: int) -> dict[str, str]:
    """Give this process's environment without what its own launcher put there.

    Args:
        threads: of a rank's operators on the CPU, unless the environment says otherwise.

    Returns:
        The environment. NVLink multicast can leave GPUs that others share unusable, so it takes the user's word to turn it on.
    """
    found = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHER)}
    return {"OMP_NUM_THREADS": str(threads)} | _NO_MULTICAST | found
