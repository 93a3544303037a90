"""The analysis child: a process with bounds on time and memory that reads what came from the wire.

A bad object kills this child, never the receiver or the worker. The child is kept between scans, because loading torch
and the weights takes seconds; it ends when its worker does, since its pipe then closes. The worker sees one of two
things: the child's reply, or `Ended` with what is known of its end.
"""

import multiprocessing
import resource
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from dicom_node import log
from dicom_node.errors import RemnantError
from dicom_node.messages import Abandoned, Answer, Comparison, Ended, Setup, Task, Version

MEMORY_LIMIT = 4 * 1024**3
"""Bytes of private data the child may have; torch, the weights and two views need about 0.6 GiB."""

START_LIMIT_S = 120.0
"""Seconds for the child to load torch and the weights; 4 to 6 are usual, a cold disk takes longer."""

_BEAT_S = 1.0

_log = log.get("analyst")


class Analyst:
    """The worker's side: starts the child, asks it, ends it."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._child: BaseProcess | None = None
        self._pipe: Connection | None = None

    def start(self, beat: Callable[[], bool] = lambda: True) -> None:
        """Start a child unless one lives; return when it is ready. Raises RemnantError if the weights do not load.

        `beat` is called about once a second: on a crowded machine loading outlasts a lease, and the scan that waits for
        it is not to be taken from us meanwhile. Its answer is left to whoever asks next, for a child is of use anyhow.
        """
        if self._child is not None and self._child.is_alive():
            return
        self.end()
        # "spawn": a forked torch may hang on the locks of threads that do not exist in the child.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._child = context.Process(target=_serve, args=(theirs, self._setup), name="remnant-analyst", daemon=True)
        started = time.monotonic()
        self._child.start()
        theirs.close()
        self._pipe = ours
        try:
            while not (told := ours.poll(_BEAT_S)) and time.monotonic() - started < START_LIMIT_S:
                beat()
            hello = ours.recv() if told else Ended("it did not start in time")
        except EOFError:
            hello = Ended("it ended while loading")
        if hello != "ready":
            self.end()
            why = hello.why if isinstance(hello, Ended) else str(hello)
            raise RemnantError(
                f"The analysis cannot start: {why}",
                hint="Receiving goes on. Run `remnant doctor`.",
                retry=True,
            )
        _log.info("analyst_ready", pid=self._child.pid, took_ms=round(1000 * (time.monotonic() - started)))

    def answer(self, task: Task, timeout_s: float, beat: Callable[[], bool]) -> Answer | Ended | Abandoned:
        """Ask for an answer. `beat` is called about once a second; when it returns False the work is abandoned."""
        reply: Answer | Ended | Abandoned = self._ask(task, timeout_s, beat)
        return reply

    def compare(self, comparison: Comparison, timeout_s: float) -> Version | Ended:
        """Ask which of the three cases of a known SOP Instance UID two objects are."""
        reply: Version | Ended = self._ask(comparison, timeout_s, lambda: True)
        return reply

    def _ask(self, message: object, timeout_s: float, beat: Callable[[], bool]) -> Any:
        self.start(beat)
        pipe, child = self._pipe, self._child
        if pipe is None or child is None:
            return Ended("there is no analysis process")
        deadline = time.monotonic() + timeout_s
        try:
            pipe.send(message)
            while not pipe.poll(min(_BEAT_S, max(0.0, deadline - time.monotonic()))):
                if not beat():
                    self.end()
                    return Abandoned()
                if time.monotonic() >= deadline:
                    self.end()
                    return Ended(f"it took longer than {timeout_s:g} s and was ended")
            return pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            child.join(5)
            code = child.exitcode
            self.end()
            return Ended(f"its process ended by itself (exit code {code})")

    def end(self) -> None:
        """End the child, at once."""
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
        if self._child is not None:
            self._child.kill()
            self._child.join()
            self._child.close()
            self._child = None


def _serve(pipe: Connection, setup: Setup) -> None:
    """Run the child: load the model once, then answer until the pipe closes."""
    # The worker decides when we end; a Ctrl-C meant for the node must not kill an analysis with a traceback.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    log.set_up(as_json=setup.log_json, role="analyst")
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT, MEMORY_LIMIT))
    from dicom_node.answer import answer_files, compare, rehearse
    from models.weights import WeightsError
    from pipeline.analyse import load_model

    try:
        model = load_model(setup.weights)
    except WeightsError as error:
        pipe.send(str(error))
        return
    if fault := rehearse(model, setup):
        pipe.send(fault)
        return
    pipe.send("ready")
    with suppress(EOFError):
        while True:
            message = pipe.recv()
            try:
                if isinstance(message, Comparison):
                    reply: object = compare(message.first, message.second)
                else:
                    reply = answer_files(
                        message, model, preprocessing=setup.preprocessing, require_views=setup.require_views
                    )
            except Exception as error:  # noqa: BLE001 - a fault of ours on this scan: the row learns of it, the child lives
                reply = Ended(log.place(error))
            pipe.send(reply)
