"""The spool: what is named is whole, names are digests, and nothing half written outlives its process."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dicom_node import spool
from dicom_node.errors import StorageError
from dicom_node.spool import Spool

PREAMBLE = b"\0" * 128 + b"DICM"
DATASET = bytes(range(256)) * 40


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def store(tmp_path: Path) -> Spool:
    return spool.open_spool(tmp_path / "var", min_free=0)


def test_an_object_lies_under_the_digest_of_its_dataset_whole(store: Spool) -> None:
    name, digest = spool.put_object(store, PREAMBLE, DATASET)
    assert digest == hashlib.sha256(DATASET).hexdigest()
    assert name == f"{digest[:2]}/{digest}.dcm"
    assert (store.objects / name).read_bytes() == PREAMBLE + DATASET
    assert files(store.incoming) == []


@pytest.mark.parametrize("size", [1, 1000, 70_000, 300_000], ids=str)
def test_an_object_that_comes_in_pieces_is_the_same_file(store: Spool, size: int) -> None:
    data = DATASET * 30
    begun = spool.Begun(store, PREAMBLE)
    for at in range(0, len(data), size):
        begun.add(memoryview(data)[at : at + size])
    name, digest = spool.put_object(store, PREAMBLE, data, begun)
    assert digest == hashlib.sha256(data).hexdigest()
    assert (store.objects / name).read_bytes() == PREAMBLE + data
    assert files(store.incoming) == []
    begun.drop()
    assert (store.objects / name).exists(), "what has its name stays"


def test_an_object_that_comes_is_written_before_its_end_and_leaves_nothing_where_that_does_not_come(
    store: Spool,
) -> None:
    begun = spool.Begun(store, PREAMBLE)
    begun.add(DATASET)
    assert files(store.incoming) == [], "too little to be worth a call"
    begun.add(DATASET * 10)
    (half,) = store.incoming.iterdir()
    assert half.read_bytes() == PREAMBLE + DATASET * 11
    begun.drop()
    begun.drop()
    assert files(store.incoming) == files(store.objects) == []


def test_what_was_begun_of_another_dataset_is_not_taken_for_this_one(store: Spool) -> None:
    begun = spool.Begun(store, PREAMBLE)
    begun.add(DATASET * 10)
    name, _ = spool.put_object(store, PREAMBLE, DATASET * 20, begun)
    assert (store.objects / name).read_bytes() == PREAMBLE + DATASET * 20
    begun.drop()
    assert files(store.incoming) == []


@pytest.mark.parametrize("refused_for", [1, 2], ids=["once", "twice"])
def test_a_disk_that_refuses_the_beginning_is_asked_once_more_at_the_end(
    store: Spool, monkeypatch: pytest.MonkeyPatch, refused_for: int
) -> None:
    write, calls = os.write, iter(range(100))

    def full(descriptor: int, data: memoryview) -> int:
        if next(calls) < refused_for:
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", full)
    begun = spool.Begun(store, PREAMBLE)
    begun.add(DATASET * 20)
    begun.add(DATASET)
    assert files(store.incoming) == []
    if refused_for == 1:
        name, _ = spool.put_object(store, PREAMBLE, DATASET * 21, begun)
        assert (store.objects / name).read_bytes() == PREAMBLE + DATASET * 21
    else:
        with pytest.raises(StorageError, match="No space left"):
            spool.put_object(store, PREAMBLE, DATASET * 21, begun)
        assert files(store.objects) == []
    assert files(store.incoming) == []


def test_the_reserve_holds_for_what_is_written_before_the_end_too(tmp_path: Path) -> None:
    full = spool.open_spool(tmp_path / "var", min_free=2**62)
    begun = spool.Begun(full, PREAMBLE)
    begun.add(DATASET * 20)
    assert files(full.incoming) == []
    with pytest.raises(StorageError, match="below the reserve"):
        spool.put_object(full, PREAMBLE, DATASET * 20, begun)


def test_a_result_lies_under_the_digest_of_the_whole_file(store: Spool) -> None:
    name, digest = spool.put_result(store, PREAMBLE + DATASET)
    assert digest == hashlib.sha256(PREAMBLE + DATASET).hexdigest()
    assert (store.results / name).read_bytes() == PREAMBLE + DATASET
    assert files(store.results) == [name]


def test_the_same_bytes_twice_are_one_file(store: Spool) -> None:
    assert spool.put_object(store, PREAMBLE, DATASET) == spool.put_object(store, PREAMBLE, DATASET)
    assert len(files(store.objects)) == 1


def test_nobody_else_may_read_what_is_kept(store: Spool, tmp_path: Path) -> None:
    name, _ = spool.put_object(store, PREAMBLE, DATASET)
    assert (store.objects / name).stat().st_mode & 0o777 == 0o600
    folders = [path for path in (tmp_path / "var").rglob("*") if path.is_dir()]
    assert {folder.stat().st_mode & 0o077 for folder in folders} == {0}


def test_opening_twice_keeps_what_is_there(store: Spool, tmp_path: Path) -> None:
    name, _ = spool.put_object(store, PREAMBLE, DATASET)
    again = spool.open_spool(tmp_path / "var", min_free=0)
    assert (again.objects / name).exists()


def test_below_the_reserve_nothing_is_written_and_trying_again_makes_sense(tmp_path: Path) -> None:
    full = spool.open_spool(tmp_path / "var", min_free=2**62)
    with pytest.raises(StorageError, match="below the reserve") as refused:
        spool.put_object(full, PREAMBLE, DATASET)
    assert refused.value.retry
    assert files(full.incoming) == files(full.objects) == []


def test_a_result_gets_out_although_the_reserve_is_reached(tmp_path: Path) -> None:
    full = spool.open_spool(tmp_path / "var", min_free=2**62)
    name, _ = spool.put_result(full, DATASET)
    assert (full.results / name).exists()


def test_a_disk_that_refuses_leaves_no_name_and_nothing_half_written(store: Spool) -> None:
    digest = hashlib.sha256(DATASET).hexdigest()
    (store.objects / digest[:2]).rmdir()  # the rename has nowhere to go
    with pytest.raises(StorageError, match="could not be made durable") as refused:
        spool.put_object(store, PREAMBLE, DATASET)
    assert refused.value.retry
    assert files(store.incoming) == files(store.objects) == []


def test_a_storage_folder_that_cannot_be_made_is_refused_with_the_key(tmp_path: Path) -> None:
    (tmp_path / "var").write_text("a file, not a folder")
    with pytest.raises(StorageError, match=r"\[storage\] directory"):
        spool.open_spool(tmp_path / "var", min_free=0)


def test_what_a_killed_process_left_half_written_goes_at_the_next_start(store: Spool) -> None:
    kept, _ = spool.put_object(store, PREAMBLE, DATASET)
    code = """
import os, sys
from pathlib import Path
from dicom_node import spool
store = spool.open_spool(Path(sys.argv[1]), min_free=0)
os.fsync = lambda descriptor: os.kill(os.getpid(), 9)  # a power cut before the bytes are durable
spool.put_object(store, b"", b"half written")
"""
    killed = subprocess.run([sys.executable, "-c", code, str(store.run.parent)], check=False, timeout=60)
    assert killed.returncode < 0
    assert len(files(store.incoming)) == 1
    assert files(store.objects) == [kept]
    assert spool.clear_unfinished(store.incoming) == 1
    assert files(store.incoming) == []
    assert files(store.objects) == [kept]


def test_bytes_and_name_are_made_durable_in_this_order(store: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any other order a power cut leaves a name without its bytes, or bytes without their name."""
    happened: list[str] = []
    sync, rename = os.fsync, Path.rename

    def fsync(descriptor: int) -> None:
        happened.append("fsync of the folder" if Path(f"/proc/self/fd/{descriptor}").is_dir() else "fsync of the file")
        sync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        happened.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", renamed)
    spool.put_object(store, PREAMBLE, DATASET)
    assert happened == ["fsync of the file", "rename", "fsync of the folder"]


def test_removing_what_is_gone_is_no_error(store: Spool) -> None:
    name, _ = spool.put_object(store, PREAMBLE, DATASET)
    spool.remove(store.objects / name)
    spool.remove(store.objects / name)
    assert files(store.objects) == []
