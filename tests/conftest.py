"""Before any test module is imported: without a GPU, Triton's kernels run in its interpreter, which it decides when it is first imported."""

from __future__ import annotations

import os
import shutil

if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
