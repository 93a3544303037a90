"""A real receiver under all kinds of rubbish at once: it serves on, and afterwards it is as it was before.

What each single kind is answered stands in the tests of the transport; here the process counts: its memory, threads and
descriptors, its log, and how long an honest camera waits meanwhile. ATTACKS multiplies the crowd.
"""

import os
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from types import ModuleType
from typing import Any

import psutil

from pipeline.camera import examination, expose
from pipeline.phantom import phantom

TIMES = int(os.environ.get("ATTACKS", "1"))
HONEST_S = 1.0
_ACCEPT, _REJECT = 2, 3  # PDU types: PS3.8 9.3.1


def _rush(port: int, sent: bytes) -> None:
    """Say everything at once and hang up; what comes back is read to its end."""
    with closing(socket.create_connection(("127.0.0.1", port), timeout=20)) as stream, suppress(OSError):
        stream.sendall(sent)
        stream.shutdown(socket.SHUT_WR)
        while stream.recv(65536):
            pass


def _talk(port: int, association: bytes, sent: bytes, wire: ModuleType) -> int:
    """Ask for an association; where there is one, say something in it and hang up. Returns the type of the answer."""
    with closing(socket.create_connection(("127.0.0.1", port), timeout=20)) as stream:
        stream.sendall(association)
        answer = int(wire.Line(stream).hear()[0])
        if answer == _ACCEPT:
            with suppress(OSError):
                stream.sendall(sent)
                stream.shutdown(socket.SHUT_WR)
                while stream.recv(65536):
                    pass
        return answer


def test_a_receiver_under_attack_serves_its_camera_and_is_afterwards_as_it_was_before(
    make_node: Callable[..., Any], camera: Callable[..., None], wait: Callable[..., Any], wire: ModuleType
) -> None:
    node = make_node().start("receive")
    port, pid = node.port, node.pid("receive")
    process = psutil.Process(pid)
    ours = wire.association(calling="OPTIMA1")
    waits: list[float] = []

    def honest() -> None:
        began = time.monotonic()
        answer = _echo(port, ours, wire)
        waits.append(time.monotonic() - began)
        assert answer, "an honest C-ECHO got no answer"

    for _ in range(20):
        honest()
    wait(lambda: process.num_threads() <= 12, "idle")
    threads, descriptors, memory = process.num_threads(), process.num_fds(), process.memory_info().rss
    waits.clear()

    def in_step() -> None:
        """The honest camera, while the others go on."""
        while not over.is_set():
            honest()
            over.wait(0.05)

    over = threading.Event()
    beside = threading.Thread(target=in_step)
    beside.start()
    try:
        for _ in range(1500 * TIMES):
            socket.create_connection(("127.0.0.1", port), timeout=20).close()
        for _ in range(1000 * TIMES):
            assert _talk(port, wire.association(calling="STRANGER"), b"", wire) == _REJECT
        # 500 objects that are none on one association, each answered.
        for _ in range(TIMES):
            _talk(port, ours, (wire.STORE_COMMAND + wire.values((3, 2, b"x"))) * 500, wire)
        # Random bytes and mutated conversations.
        for seed in range(600 * TIMES):
            _rush(port, wire.rubbish(seed).replace(b"CAMERA ", b"OPTIMA1"))
        # Every way to break the protocol, before and within an association.
        for sent in wire.BEFORE.values():
            _rush(port, sent)
        for sent, _ in wire.WITHIN.values():
            assert _talk(port, ours, sent.replace(wire.GOOD, ours), wire) == _ACCEPT
        # Lengths that lie: a PDU of 512 MiB and of 4 GiB, with 4 MB of it behind.
        for length in (512 * 1024**2, 0xFFFF_FFFF):
            _rush(port, struct.pack(">BBI", 1, 0, length) + bytes(4_000_000))
            _talk(port, ours, struct.pack(">BBI", 4, 0, length) + bytes(4_000_000), wire)
    finally:
        over.set()
        beside.join()

    honest()
    assert max(waits) < HONEST_S, f"an honest C-ECHO waited {max(waits):.2f} s"
    assert node.pid("receive") == pid
    wait(lambda: process.num_threads() <= threads, "threads back")
    wait(lambda: process.num_fds() <= descriptors, "descriptors back")
    assert process.memory_info().rss - memory < 10_000_000
    # Limited; what is left out is counted.
    lines = [line for line in node.log.splitlines() if re.search("refused|association_cut", line)]
    assert 0 < len(lines) < 300 * TIMES
    # And it still takes a scan.
    (ds,) = expose(phantom(6300), examination(6300), "two_frames")
    camera(port, [ds])
    assert len(node.rows()) == 1
    # The count is told with the next line, at the latest when the node stops.
    node.stop()
    left_out = sum(int(count) for count in re.findall(r"lines_left_out(?:=| +count=)(\d+)", node.log))
    assert left_out + len(lines) >= (1000 + 500) * TIMES


def _echo(port: int, association: bytes, wire: ModuleType) -> bool:
    with closing(socket.create_connection(("127.0.0.1", port), timeout=20)) as stream:
        peer = wire.Line(stream)
        peer.say(association)
        if peer.hear()[0] != 2:
            return False
        peer.say(wire.ECHO)
        kind, content = peer.hear()
        peer.say(wire.RELEASE)
        return bool((kind, content[-2:]) == (4, b"\0\0") and peer.hear()[0] == 6)
