"""Starting to write a file's pages to the disk, so that the fsync that follows finds little left to do."""

from __future__ import annotations

import ctypes
import sys

_WRITE = 2  # SYNC_FILE_RANGE_WRITE of linux/fs.h: begin, don't wait
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
_call = getattr(_libc, "sync_file_range", None)


def start_writeback(fd: int, begin: int, nbytes: int) -> None:
    """Ask the kernel to begin writing a range of a file; a hint, so failures and other systems are passed over.

    Args:
        fd: the open file.
        begin: where the range begins, in bytes.
        nbytes: its length in bytes.

    Source: https://github.com/torvalds/linux/blob/v6.12/fs/sync.c (sync_file_range).
    """
    if _call is not None and nbytes:
        _call(fd, ctypes.c_int64(begin), ctypes.c_int64(nbytes), _WRITE)
