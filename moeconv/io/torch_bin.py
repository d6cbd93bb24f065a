"""Weights of old Hugging Face folders, `pytorch_model*.bin`: found in their archives without running the pickle."""

from __future__ import annotations

from pathlib import Path

from moeconv.dtypes import dtype
from moeconv.errors import SourceError
from moeconv.io.decode import MAX_NAME_CHARS, brief
from moeconv.io.safetensors import Entry, Header

BIN_PATTERN = "pytorch_model*.bin"
BIN_INDEX = "pytorch_model.bin.index.json"
# transformers before 4.32 saved these buffers; it and every reader since compute them from config.json.
_COMPUTED = ".rotary_emb.inv_freq"


def is_computed(name: str) -> bool:
    """Say whether a tensor is a buffer that readers compute from config.json: rotary frequencies."""
    return name.endswith(_COMPUTED)


def bin_names(root: Path) -> list[str]:
    """List the weight files of a folder that has no safetensors."""
    return sorted(p.name for p in root.glob(BIN_PATTERN))


def read_bin(path: Path) -> tuple[Header, list[str]]:
    """Find the tensors of a `.bin` file.

    Args:
        path: the file, as `torch.save` of a state dict wrote it.

    Returns:
        A header like that of a safetensors file, with no raw bytes (tensors that share a storage share their bytes), and
        the names of buffers that were left out, since they are computed from the config: rotary frequencies.

    Raises:
        SourceError: the file is damaged, holds anything but contiguous tensors by name, or its pickle is no data.
    """
    from moeconv.io.torch_archive import read_archive, row_major  # here: most checkpoints hold no pickle
    from moeconv.io.unpickle import TensorRef

    archive = read_archive(path)
    if not isinstance(archive.root, dict):
        raise SourceError(f"{path}: holds no state dict")
    entries, computed = [], []
    for name, value in archive.root.items():
        if not isinstance(name, str) or len(name) > MAX_NAME_CHARS or not isinstance(value, TensorRef):
            raise SourceError(f"{path}: {brief(name)} is no tensor; expected a model's state dict")
        if is_computed(name):
            computed.append(name)
            continue
        if value.strides != row_major(value.shape) and 0 not in value.shape:
            raise SourceError(
                f"{path}: {name} is stored with strides {list(value.strides)}, not row by row; save it again with "
                "transformers' save_pretrained"
            )
        begin, size = archive.begin(value), dtype(value.dtype).itemsize
        for n in value.shape:
            size *= n
        entries.append(Entry(name, value.dtype, value.shape, begin, begin + size))
    entries.sort(key=lambda e: (e.begin, e.end))
    return Header(b"", tuple(entries), {}, path.stat().st_size), computed
