"""CUDA C++ to a kernel that can be launched: compiled by NVRTC when it is first used, in a fraction of a second."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from cuda.bindings import driver, nvrtc

SOURCES = Path(__file__).with_name("cuda")


def checked(result: tuple[Any, ...]) -> Any:
    """What a call of the driver or the compiler returned besides its status.

    Raises:
        RuntimeError: the status is an error.
    """
    status, *values = result
    if status.value:
        raise RuntimeError(f"CUDA: {status.name}")
    return values[0] if values else None


def compile_cubin(source: str, architecture: str) -> bytes:
    """Machine code of a CUDA C++ text; needs no GPU.

    Args:
        source: the text; it may include the files of `SOURCES`.
        architecture: as sm_90a.

    Returns:
        The cubin.

    Raises:
        RuntimeError: the text does not compile; with the compiler's log.
    """
    program = checked(nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], []))
    options = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17", f"--include-path={SOURCES}".encode()]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if status.value:
        log = b" " * checked(nvrtc.nvrtcGetProgramLogSize(program))
        checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"a kernel does not compile for {architecture}:\n{log.decode()}")
    cubin: bytes = b" " * checked(nvrtc.nvrtcGetCUBINSize(program))
    checked(nvrtc.nvrtcGetCUBIN(program, cubin))
    checked(nvrtc.nvrtcDestroyProgram(program))
    return cubin


class Kernel:
    """A kernel that takes one struct, loaded for the current device."""

    def __init__(self, cubin: bytes, name: str, shared_bytes: int) -> None:
        torch.cuda.current_stream().synchronize()  # makes torch's context current, if nothing has yet
        library = checked(driver.cuLibraryLoadData(cubin, [], [], 0, [], [], 0))
        self._function = checked(driver.cuKernelGetFunction(checked(driver.cuLibraryGetKernel(library, name.encode()))))
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        checked(driver.cuFuncSetAttribute(self._function, attribute, shared_bytes))
        self._shared_bytes = shared_bytes

    def launch(self, num_blocks: int, block_size: int, struct: bytes) -> None:
        """Launch on torch's current stream.

        Args:
            num_blocks: of the grid.
            block_size: threads of a block.
            struct: the argument; the launch copies it.
        """
        buffer = ctypes.create_string_buffer(struct, len(struct))
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(buffer))
        stream = torch.cuda.current_stream().cuda_stream
        grid, block = (num_blocks, 1, 1), (block_size, 1, 1)
        pointers = ctypes.addressof(arguments)
        checked(driver.cuLaunchKernel(self._function, *grid, *block, self._shared_bytes, stream, pointers, 0))
