"""Memory by its pages."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from moec.runtime import pages


def test_memory_is_aligned_and_of_the_size_asked_for() -> None:
    block = pages.empty_huge((5 << 20) + 3)
    assert block.numel() == (5 << 20) + 3 and block.data_ptr() % pages.HUGE_PAGE_BYTES == 0
    assert pages.empty_aligned(7).data_ptr() % pages.TENSOR_ALIGN_BYTES == 0
    assert pages.empty_huge(0).numel() == 0


def test_only_whole_pages_inside_of_the_memory_are_advised(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hint for half a page would also be about memory of others."""
    advised: list[tuple[int, int, str]] = []
    monkeypatch.setattr(pages, "_advise", lambda *given: advised.append(given))
    block = pages.empty_huge((2 << 20) + 1)
    assert advised == [(block.data_ptr(), 4 << 20, "MADV_HUGEPAGE")]
    assert block.untyped_storage().nbytes() >= block.data_ptr() - block.untyped_storage().data_ptr() + (4 << 20)
    advised.clear()
    page = mmap.PAGESIZE
    pages.forget_pages(page + 1, 2 * page)
    pages.forget_pages(page + 1, page)
    assert advised == [(2 * page, page, "MADV_DONTNEED")]


def test_forgotten_pages_of_a_file_come_back(tmp_path: Path) -> None:
    size = 16 * mmap.PAGESIZE
    (tmp_path / "file").write_bytes(bytes(range(256)) * (size // 256))
    mapped = torch.from_file(str(tmp_path / "file"), size=size, dtype=torch.uint8)
    before = mapped.clone()
    pages.forget_pages(mapped.data_ptr(), size)
    assert torch.equal(mapped, before)
