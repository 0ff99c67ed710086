"""From how many rows on matrices are unpacked: measured once, kept, and measured again where that is of no use."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ringlm.parallel.kernels.choice import NEVER, Product, unpack_from


class Timed:
    """Products that take so many seconds: by bytes a row, and by unpacking whatever the rows."""

    def __init__(self, row_s: float, unpacking_s: float) -> None:
        self.row_s, self.unpacking_s, self.made = row_s, unpacking_s, 0

    def __call__(self, unpacked_from: int) -> Product:
        self.made += 1
        return lambda x: time.sleep(self.unpacking_s if unpacked_from == 0 else len(x) * self.row_s)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "ringlm" / "products.json"


def test_measured_once_and_kept(cache: Path) -> None:
    sample = Timed(row_s=1e-4, unpacking_s=4e-3)
    found = unpack_from(sample, 8)
    assert 32 <= found <= 64
    assert unpack_from(Timed(row_s=1.0, unpacking_s=1.0), 8) == found
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        assert unpack_from(Timed(row_s=1e-5, unpacking_s=1e-2), 8) == NEVER  # another setting is measured by itself
    finally:
        torch.set_num_threads(before)
    assert unpack_from(sample, 8) == found
    assert sample.made == 2


@pytest.mark.parametrize(
    "spoil", [lambda path: path.write_text("{"), lambda path: path.write_text('{"unpack_from": {"a": "b"}}')]
)
def test_what_cannot_be_read_is_measured_again(cache: Path, spoil: Callable[[Path], object]) -> None:
    cache.parent.mkdir()
    spoil(cache)
    assert unpack_from(Timed(row_s=1e-4, unpacking_s=1e-4), 8) == 16
    assert unpack_from(Timed(row_s=1.0, unpacking_s=1.0), 8) == 16


def test_a_folder_that_cannot_be_written_stops_nothing(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.parent.write_text("a file where the folder should be")
    assert unpack_from(Timed(row_s=1e-4, unpacking_s=1e-4), 8) == 16
    assert "cannot be kept" in caplog.text
