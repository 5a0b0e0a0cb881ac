"""Memory by its pages: huge ones for what kernels walk through, and those of mapped files given back."""

from __future__ import annotations

import ctypes
import mmap

import torch

HUGE_PAGE_BYTES = 2 << 20
TENSOR_ALIGN_BYTES = 64


def empty_aligned(num_bytes: int, align_bytes: int = TENSOR_ALIGN_BYTES) -> torch.Tensor:
    """An uninitialised u8[num_bytes] tensor whose address is a multiple of align_bytes."""
    block = torch.empty(num_bytes + align_bytes, dtype=torch.uint8)
    start = -block.data_ptr() % align_bytes
    return block[start : start + num_bytes]


def empty_huge(num_bytes: int) -> torch.Tensor:
    """Like empty_aligned on 2 MiB pages where the system gives them (a hint: nothing fails without).

    For weights and for the arena: a walk over gigabytes, or rows that lie far apart, otherwise spend their time in
    page-table look-ups. Fill it after this call, the pages are chosen at the first write.
    """
    block = empty_aligned(-(-num_bytes // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES, HUGE_PAGE_BYTES)
    if num_bytes:
        _advise(block.data_ptr(), block.numel(), "MADV_HUGEPAGE")
    return block[:num_bytes]


def forget_pages(address: int, num_bytes: int) -> None:
    """Takes the whole pages of a mapped file out of the process's memory; they come back when they are read again."""
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (address + num_bytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
    if length > 0:
        _advise(start, length, "MADV_DONTNEED")


def _advise(address: int, num_bytes: int, advice: str) -> None:
    """Tells the system about whole pages, where it takes such advice."""
    if hasattr(mmap, advice):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), getattr(mmap, advice))
