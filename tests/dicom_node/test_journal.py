"""The journal: one barrier makes an object of a burst durable, and a start after a crash puts it on its shelf."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import pytest

from dicom_node import journal, spool
from dicom_node.errors import StorageError
from dicom_node.journal import Journal
from dicom_node.spool import Spool

PREAMBLE = b"\0" * 128 + b"DICM" + b"\2\0\0\0UL\4\0\0\0\0\0"


def dataset(number: int, length: int = 10_000) -> bytes:
    return hashlib.shake_256(str(number).encode()).digest(length)


def name_of(data: bytes) -> str:
    digest = hashlib.sha256(data).hexdigest()
    return f"{digest[:2]}/{digest}.dcm"


@pytest.fixture
def store(tmp_path: Path) -> Spool:
    return spool.open_spool(tmp_path / "var", min_free=0)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "QUIET_S", 0.05)
    monkeypatch.setattr(journal, "REST_S", 600.0)
    monkeypatch.setattr(journal, "_LOOK_S", 0.01)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a busy machine does to the test, all its objects are one burst, and nothing is quiet."""
    monkeypatch.setattr(journal, "BURST_S", 600.0)
    monkeypatch.setattr(journal, "QUIET_S", 600.0)
    monkeypatch.setattr(journal, "REST_S", 600.0)


@pytest.fixture
def kept(store: Spool, patient: None) -> Iterator[Journal]:
    """A journal of the spool whose segments are there already."""
    made = spool.open_journal(store)
    made.start()
    begin(store, made)
    yield made
    made.stop()


def begin(store: Spool, kept: Journal) -> None:
    """A burst begins: its first objects still pay for files of their own."""
    for number in range(journal.BURST_OBJECTS):
        put(store, kept, dataset(-number))
    wait(lambda: len(list(store.journal.iterdir())) == journal.SEGMENTS)
    # The names are there before they are taken into use.
    wait(lambda: kept._active is not None)


def wait(fulfilled: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not fulfilled():
        assert time.monotonic() < deadline, "waited 20 s"
        time.sleep(0.005)


def put(store: Spool, kept: Journal | None, data: bytes) -> str:
    with spool.placing(store, PREAMBLE, data, journal=kept) as placed:
        placed.settle()
        return placed.name


def lose_power(store: Spool, *names: str) -> None:
    """What a power cut does to files that were never synced: one is gone, the next is empty."""
    for number, name in enumerate(names):
        (store.objects / name).unlink() if number % 2 else (store.objects / name).write_bytes(b"")


def dead(store: Spool, tmp_path: Path) -> Path:
    """A spool as a process leaves it that dies at once: the segments that lie there, and no lock on them."""
    copy = tmp_path / "dead"
    subprocess.run(["cp", "-r", str(store.objects.parent.parent), str(copy)], check=True)
    return copy


def shelf(directory: Path) -> dict[str, bytes]:
    objects = directory / "spool" / "objects"
    return {str(path.relative_to(objects)): path.read_bytes() for path in objects.glob("??/*.dcm")}


def test_a_neck_alone_makes_no_journal(store: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "BURST_S", 600.0)
    kept = spool.open_journal(store)
    kept.start()
    for number in range(journal.BURST_OBJECTS - 1):
        put(store, kept, dataset(number))
    assert not kept._wanted
    monkeypatch.setattr(journal, "BURST_S", 0.0)  # whatever comes now, the one before was too long ago
    for number in range(20):
        put(store, kept, dataset(number))
    assert not kept._wanted
    kept.stop()
    assert list(store.journal.iterdir()) == []


def test_an_object_of_a_burst_costs_one_barrier_before_it_is_named(
    store: Spool, kept: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    rename = Path.rename

    def noting(what: str, call: Callable[[int], None]) -> Callable[[int], None]:
        def noted(descriptor: int) -> None:
            happened.append(f"{what} of {Path(f'/proc/self/fd/{descriptor}').readlink().suffix}")
            call(descriptor)

        return noted

    def renamed(path: Path, target: Path) -> Path:
        happened.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noting("fsync", os.fsync))
    monkeypatch.setattr(os, "fdatasync", noting("fdatasync", os.fdatasync))
    monkeypatch.setattr(Path, "rename", renamed)
    name = put(store, kept, dataset(1))
    assert happened == ["fdatasync of .journal", "rename"]
    assert (store.objects / name).read_bytes() == PREAMBLE + dataset(1)


def test_what_was_settled_is_on_its_shelf_after_a_power_cut(store: Spool, kept: Journal, tmp_path: Path) -> None:
    objects = [dataset(number, length) for number, length in enumerate((1, 4_000, 4_096, 100_000, 300_001))]
    names = [put(store, kept, one) for one in objects]
    lose_power(store, *names)
    directory = dead(store, tmp_path)
    spool.open_spool(directory, 0)
    assert shelf(directory).items() >= {name_of(one): PREAMBLE + one for one in objects}.items()
    assert list((directory / "spool" / "journal").iterdir()) == []
    spool.open_spool(directory, 0)


def test_a_start_that_is_killed_amid_restoring_is_made_good_by_the_next(
    store: Spool, kept: Journal, tmp_path: Path
) -> None:
    names = [put(store, kept, dataset(number)) for number in range(3)]
    lose_power(store, *names)
    directory = dead(store, tmp_path)
    code = """
import os, sys
from pathlib import Path
from dicom_node import spool
calls, rename = iter(range(3)), Path.rename
Path.rename = lambda path, to: rename(path, to) if next(calls) < 2 else os.kill(os.getpid(), 9)
spool.restore(spool.Spool(*[Path(sys.argv[1]) / "spool" / one for one in (
    "incoming", "journal", "rendering", "objects", "quarantine", "results", "run")], min_free=0))
"""
    killed = subprocess.run([sys.executable, "-c", code, str(directory)], check=False, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert len(list((directory / "spool" / "journal").glob("*.part"))) == 1
    spool.open_spool(directory, 0)
    assert set(names) <= set(shelf(directory))
    assert list((directory / "spool" / "journal").iterdir()) == []


@pytest.mark.parametrize("damage", ["cut", "flipped head", "flipped body", "zeros"])
def test_a_record_that_never_came_to_its_barrier_is_left_out_and_those_before_it_are_not(
    store: Spool, kept: Journal, tmp_path: Path, damage: str
) -> None:
    names = [put(store, kept, dataset(number)) for number in range(3)]
    directory = dead(store, tmp_path)
    for path in (directory / "spool" / "objects").glob("??/*.dcm"):
        path.unlink()
    (segment,) = (one for one in (directory / "spool" / "journal").iterdir() if one.stat().st_size)
    data = bytearray(segment.read_bytes())
    last = len(data) * 2 // 3
    if damage == "cut":
        del data[last + 5_000 :]
    elif damage == "zeros":
        data[last:] = bytes(len(data) - last)
    else:
        data[last + (10 if damage == "flipped head" else 5_000)] ^= 1
    segment.write_bytes(data)
    spool.open_spool(directory, 0)
    assert set(shelf(directory)) == set(names[:2])


def test_no_disk_is_asked_to_restore_what_another_process_still_writes(store: Spool, kept: Journal) -> None:
    name = put(store, kept, dataset(1))
    (store.objects / name).unlink()
    again = spool.open_spool(store.objects.parent.parent, 0)
    assert not (again.objects / name).exists()
    assert len(list(store.journal.iterdir())) == journal.SEGMENTS


def test_two_processes_that_start_at_once_restore_once_and_neither_goes_on_before(
    store: Spool, kept: Journal, tmp_path: Path
) -> None:
    names = [put(store, kept, dataset(number)) for number in range(20)]
    lose_power(store, *names)
    directory = dead(store, tmp_path)
    found: list[set[str]] = []

    def start() -> None:
        spool.open_spool(directory, 0)
        found.append(set(shelf(directory)))

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(one >= set(names) for one in found)


def test_what_cannot_be_restored_stays_in_the_journal_for_the_next_start(
    store: Spool, kept: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = put(store, kept, dataset(1))
    directory = dead(store, tmp_path)
    (directory / "spool" / "objects" / name).unlink()

    def full(_descriptor: int, _data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(StorageError, match="No space left") as refused:
            spool.open_spool(directory, 0)
    assert refused.value.retry
    assert refused.value.hint
    spool.open_spool(directory, 0)
    assert shelf(directory)[name] == PREAMBLE + dataset(1)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_what_an_admins_command_restores_belongs_to_the_user_of_the_node(
    store: Spool, kept: Journal, tmp_path: Path
) -> None:
    name = put(store, kept, dataset(1))
    directory = dead(store, tmp_path)
    for segment in (directory / "spool" / "journal").iterdir():
        os.chown(segment, 65534, 65534)
    spool.open_spool(directory, 0)
    found = (directory / "spool" / "objects" / name).stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (65534, 65534, 0o600)


def test_a_file_system_that_takes_no_advice_costs_nothing_but_time(
    store: Spool, kept: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "posix_fadvise", refuse)
    name = put(store, kept, dataset(1))
    assert (store.objects / name).read_bytes() == PREAMBLE + dataset(1)
    assert any(one.end for one in kept._segments)


def watching(names: list[str], objects: Path) -> Callable[[Collection[str]], None]:
    def sync_files(some: Collection[str]) -> None:
        assert all((objects / name).exists() for name in some)
        names.extend(some)

    return sync_files


def test_when_nothing_comes_files_are_synced_and_the_journal_forgets_them(
    store: Spool, quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(journal, "BURST_S", 600.0)
    synced: list[str] = []
    kept = Journal(store.journal, room=lambda _: None, sync_files=watching(synced, store.objects))
    kept.start()
    begin(store, kept)
    names = [put(store, kept, dataset(number)) for number in range(3)]
    wait(lambda: set(names) <= set(synced))
    wait(lambda: all(not one.end for one in kept._segments))
    directory = dead(store, tmp_path)
    for path in (directory / "spool" / "objects").glob("??/*.dcm"):
        path.unlink()
    spool.open_spool(directory, 0)
    assert shelf(directory) == {}, "what was synced is not restored: it may have been removed since"
    again = put(store, kept, dataset(9))
    wait(lambda: again in synced)
    monkeypatch.setattr(journal, "REST_S", 0.0)
    wait(lambda: not list(store.journal.iterdir()))
    monkeypatch.setattr(journal, "REST_S", 600.0)
    begin(store, kept)
    put(store, kept, dataset(10))
    kept.stop()
    assert list(store.journal.iterdir()) == []


def test_a_record_of_an_earlier_time_is_not_restored_behind_a_new_one(
    store: Spool, quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A segment is written again from its start; what stood there longer than the new records is no record any more."""
    monkeypatch.setattr(journal, "BURST_S", 600.0)
    kept = spool.open_journal(store)
    kept.start()
    begin(store, kept)
    written = set()
    for first in (0, 10):  # in turn, so that both segments were written once
        written.add(kept._active)
        for number in range(first, first + 6):
            put(store, kept, dataset(number))
        wait(lambda: all(not one.end for one in kept._segments))
    assert len(written) == journal.SEGMENTS
    monkeypatch.setattr(journal, "QUIET_S", 600.0)
    new = [put(store, kept, dataset(number)) for number in (20, 21)]
    assert max(path.stat().st_size for path in store.journal.iterdir()) > 4 * 12_288
    directory = dead(store, tmp_path)
    for path in (directory / "spool" / "objects").glob("??/*.dcm"):
        path.unlink()
    spool.open_spool(directory, 0)
    assert set(shelf(directory)) == set(new)
    kept.stop()


def test_a_full_segment_gives_way_to_the_other_and_where_both_are_full_a_file_is_synced_by_itself(
    store: Spool, patient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_sync, synced = threading.Event(), []

    def sync_files(names: Collection[str]) -> None:
        may_sync.wait(20)
        synced.extend(names)

    kept = Journal(store.journal, room=lambda _: None, sync_files=sync_files, segment_bytes=3 * 12_288)
    kept.start()
    begin(store, kept)
    barriers: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (barriers.append(descriptor), fsync(descriptor))[1])
    names = [put(store, kept, dataset(number)) for number in range(6)]
    assert barriers == []
    own = put(store, kept, dataset(6))
    assert len(barriers) == 2, "its file and its folder"
    may_sync.set()
    wait(lambda: set(names) <= set(synced))
    assert own not in synced
    wait(lambda: kept._active is not None and not kept._active.end)
    barriers.clear()
    put(store, kept, dataset(7))
    assert barriers == [], "there is room again"
    kept.stop()


def test_an_object_longer_than_a_segment_has_a_file_of_its_own(store: Spool, patient: None) -> None:
    kept = Journal(store.journal, room=lambda _: None, sync_files=lambda _: None, segment_bytes=50_000)
    kept.start()
    begin(store, kept)
    name = put(store, kept, dataset(1, 60_000))
    assert (store.objects / name).read_bytes() == PREAMBLE + dataset(1, 60_000)
    assert all(path.stat().st_size == 0 for path in store.journal.iterdir())
    kept.stop()


@pytest.mark.parametrize("call", ["pwritev", "fdatasync"])
def test_a_disk_that_refuses_the_journal_is_asked_for_a_file_and_the_journal_given_up(
    store: Spool, kept: Journal, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    before = put(store, kept, dataset(1))

    def refuse(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    barriers: list[int] = []
    fsync = os.fsync
    with monkeypatch.context() as patched:
        patched.setattr(os, call, refuse)
        patched.setattr(os, "fsync", lambda descriptor: (barriers.append(descriptor), fsync(descriptor))[1])
        name = put(store, kept, dataset(2))
        assert len(barriers) >= 2
    for one, number in ((before, 1), (name, 2)):
        assert (store.objects / one).read_bytes() == PREAMBLE + dataset(number)
    wait(lambda: not list(store.journal.iterdir()))
    put(store, kept, dataset(3))
    put(store, kept, dataset(4))
    assert list(store.journal.iterdir()) == []


def test_a_barrier_that_failed_once_is_never_taken_for_one_that_holds(
    store: Spool, kept: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells a failed write to one who asks, and to the next that all is well."""
    put(store, kept, dataset(0))
    entries = [kept.append(PREAMBLE, dataset(number), hashlib.sha256(dataset(number)).hexdigest()) for number in (1, 2)]
    with monkeypatch.context() as patched:
        fdatasync, calls = os.fdatasync, iter(range(9))

        def fail_once(descriptor: int) -> None:
            if next(calls) == 0:
                raise OSError(errno.EIO, "Input/output error")
            fdatasync(descriptor)

        patched.setattr(os, "fdatasync", fail_once)
        assert [entry is not None and entry.sync() for entry in entries] == [False, False]
    for entry in entries:
        assert entry is not None
        entry.named(None)


def test_files_that_cannot_be_synced_stay_in_the_journal_until_the_next_start(
    store: Spool, quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(journal, "BURST_S", 600.0)
    tried = threading.Event()

    def sync_files(_names: Collection[str]) -> None:
        tried.set()
        raise OSError(errno.EIO, "Input/output error")

    kept = Journal(store.journal, room=lambda _: None, sync_files=sync_files)
    kept.start()
    begin(store, kept)
    name = put(store, kept, dataset(1))
    assert tried.wait(20)
    put(store, kept, dataset(2))
    kept.stop()
    directory = dead(store, tmp_path)
    (directory / "spool" / "objects" / name).unlink()
    spool.open_spool(directory, 0)
    assert name in shelf(directory)


def test_without_room_beyond_the_reserve_there_is_no_journal(store: Spool, patient: None) -> None:
    asked = threading.Event()

    def room(_coming: int) -> None:
        asked.set()
        raise StorageError("no room")

    kept = Journal(store.journal, room=room, sync_files=lambda _: None)
    kept.start()
    for number in range(journal.BURST_OBJECTS):
        put(store, kept, dataset(number))
    assert asked.wait(20)
    for number in range(journal.BURST_OBJECTS, 20):
        put(store, kept, dataset(number))
    kept.stop()
    assert list(store.journal.iterdir()) == []
    assert len(shelf(store.objects.parent.parent)) == 20


def test_what_is_not_settled_leaves_neither_file_nor_debt(store: Spool, kept: Journal) -> None:
    with pytest.raises(KeyError), spool.placing(store, PREAMBLE, dataset(1), journal=kept):
        raise KeyError
    assert not (store.objects / name_of(dataset(1))).exists()
    assert list(store.incoming.iterdir()) == []
    assert all(one.unnamed == 0 for one in kept._segments)


def test_many_threads_share_a_barrier_and_each_object_is_restored(
    store: Spool, kept: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fdatasync, barriers, meet = os.fdatasync, [], threading.Barrier(8)

    def counted(descriptor: int) -> None:
        barriers.append(descriptor)
        if len(barriers) == 1:  # until each of the others has written its first and waits
            wait(lambda: sum(one.unnamed for one in kept._segments) == 8)
        fdatasync(descriptor)

    monkeypatch.setattr(os, "fdatasync", counted)
    names: list[str] = []

    def send(number: int) -> None:
        meet.wait(20)
        names.extend(put(store, kept, dataset(10 * number + index)) for index in range(5))

    threads = [threading.Thread(target=send, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(names) == 40
    assert len(barriers) <= 40 - 6, "the second barrier was for all but the first object"
    directory = dead(store, tmp_path)
    for path in (directory / "spool" / "objects").glob("??/*.dcm"):
        path.unlink()
    spool.open_spool(directory, 0)
    assert set(shelf(directory)) == set(names)


def test_files_of_the_journal_are_synced_though_one_was_removed_meanwhile(store: Spool) -> None:
    names = [spool.put_object(store, PREAMBLE, dataset(number))[0] for number in range(20)]
    (store.objects / names[3]).unlink()
    spool._sync_files(store, names)
