"""Shards: rows are found by content, mapped from disk, checked to the last bit and made again when damaged."""

from __future__ import annotations

import errno
import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from apl_core.errors import StorageError, TrainingStopped
from apl_train.processes import Processes
from apl_train.training.shards import ShardStore, bytes_hash


class Source:
    """Makes row k as [k, k + 0.5] and a 63-bit number, and notes what it was asked for."""

    def __init__(self, keys: Sequence[str]) -> None:
        self.keys, self.asked = list(keys), []

    def __call__(self, positions: Sequence[int]) -> dict[str, Tensor]:
        self.asked.append([self.keys[p] for p in positions])
        values = torch.tensor([float(self.keys[p]) for p in positions])
        big = torch.tensor([2**62 + int(self.keys[p]) for p in positions])
        return {"x": torch.stack([values, values + 0.5], 1), "big": big}

    def rows(self, folder: Path, **options):
        return ShardStore(folder).rows(self.keys, self, size=4, **options)


KEYS = [str(k) for k in range(10)]


def right(rows, keys: Sequence[str]) -> bool:
    wanted = torch.tensor([float(k) for k in keys])
    return torch.equal(rows.take("x", range(len(keys))), torch.stack([wanted, wanted + 0.5], 1))


def test_made_once_and_found_again(tmp_path: Path) -> None:
    first, again = Source(KEYS), Source(KEYS)
    assert right(first.rows(tmp_path), KEYS) and first.asked == [KEYS[:4], KEYS[4:8], KEYS[8:]]
    assert right(again.rows(tmp_path), KEYS) and again.asked == []
    mixed = Source(["7", "20", "7", "3", "20"])  # another set with two of the rows, and each twice
    rows = mixed.rows(tmp_path)
    assert right(rows, mixed.keys) and mixed.asked == [["20"]] and len(rows) == 5
    assert rows.take("x", torch.tensor([3, 0])).tolist() == [[3.0, 3.5], [7.0, 7.5]]


def test_rows_are_mapped_not_read(tmp_path: Path) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc")
    source = Source(KEYS)
    source.rows(tmp_path)
    rows = source.rows(tmp_path)
    place = rows.one("x", 0).data_ptr()
    files = [line.split()[-1] for line in maps.read_text().splitlines() if "-" in line.split()[0]
             and int(line.split()[0].split("-")[0], 16) <= place < int(line.split()[0].split("-")[1], 16)]
    assert files and files[0].startswith(str(tmp_path))


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "truncated":
        data = data[:-5]
    elif how == "empty":
        data = bytearray()
    elif how == "header":
        data[3] ^= 0xFF
    elif how == "one bit":
        data[-20] ^= 1
    elif how == "low bit of a whole number":  # invisible to a hash over float32 values
        with safe_open(path, framework="pt") as file:
            big = file.get_tensor("big")
        at = bytes(data).index(big.numpy().tobytes())
        data[at] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("how", ["truncated", "empty", "header", "one bit", "low bit of a whole number"])
def test_a_damaged_shard_is_made_again(tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture) -> None:
    source = Source(KEYS)
    source.rows(tmp_path)
    by_content = {safe_open(p, framework="pt").get_tensor("x")[0, 0].item(): p for p in tmp_path.glob("*.safetensors")}
    names = {p.name for p in by_content.values()}
    source.asked.clear()
    damage(by_content[4.0], how)
    with caplog.at_level(logging.WARNING, "apl.cache"):
        rows = source.rows(tmp_path)
    assert source.asked == [KEYS[4:8]]  # that one alone, from the same rows
    assert right(rows, KEYS) and rows.take("big", range(10)).tolist() == [2**62 + k for k in range(10)]
    assert "is damaged" in caplog.text
    assert {p.name for p in tmp_path.iterdir()} == names
    source.asked.clear()
    assert right(source.rows(tmp_path), KEYS) and source.asked == []


def test_stopping_keeps_what_is_there(tmp_path: Path) -> None:
    source = Source(KEYS)
    with pytest.raises(TrainingStopped, match="4 of 10"):
        source.rows(tmp_path, stop=lambda: bool(source.asked))
    seen: list[tuple[int, int]] = []
    rows = source.rows(tmp_path, progress=lambda *at: seen.append(at))
    assert right(rows, KEYS) and source.asked == [KEYS[:4], KEYS[4:8], KEYS[8:]]
    assert seen[0] == (8, 10) and seen[-1] == (10, 10)


def test_a_full_disk_is_said_and_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, real = Source(KEYS), Path.replace

    def full(self: Path, target: Path) -> Path:
        if source.asked[-1][0] == "4":
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(StorageError, match="No space left") as caught:
        source.rows(tmp_path)
    assert "free some space" in caught.value.hint
    monkeypatch.setattr(Path, "replace", real)
    assert len(list(tmp_path.iterdir())) == 1
    assert right(source.rows(tmp_path), KEYS)


class Part(Processes):
    """One of several processes, as far as a single one can play it: what the others write is not there yet."""

    def __init__(self, index: int, count: int) -> None:
        self.index, self.count = index, count


def test_missing_shards_are_divided_without_overlap_or_loss(tmp_path: Path) -> None:
    keys = [str(k) for k in range(30)]
    made = []
    for index in range(3):
        source = Source(keys)
        assert right(source.rows(tmp_path / f"disk{index}", processes=Part(index, 3)), keys)
        made += source.asked[: len(Part(index, 3).share(range(8)))]  # after these: what others did not bring
        assert sorted((key for group in source.asked for key in group), key=int) == keys
    shares = [key for group in made for key in group]
    assert sorted(shares, key=int) == keys and len(set(shares)) == 30


def test_every_bit_counts() -> None:
    a = {"x": torch.tensor([1.0, 2.0]), "n": torch.tensor([2**62 + 1])}
    assert bytes_hash(a) == bytes_hash({k: v.clone() for k, v in a.items()})
    for changed in ({**a, "n": torch.tensor([2**62])}, {**a, "x": torch.tensor([[1.0, 2.0]])},
                    {"y": a["x"], "n": a["n"]}, {**a, "x": a["x"].double()}):
        assert bytes_hash(changed) != bytes_hash(a)
    assert bytes_hash({"x": torch.ones(2, dtype=torch.bfloat16)}) != bytes_hash({"x": torch.ones(2)})
