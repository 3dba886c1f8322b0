"""A bell that a process rings when it is told to end, for work that runs elsewhere.

A file of its own: the actor's process imports no more than this.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray


class Bell:
    """Rung by the driver, listened to by the workers; an actor, since they are on other machines."""

    def __init__(self) -> None:
        self.rung = False

    def ring(self) -> None:
        self.rung = True

    def heard(self) -> bool:
        return self.rung


@contextmanager
def bell_on_sigterm() -> Iterator[Any]:
    """An actor that has rung once this process was sent SIGTERM, which does no more than that while the block runs.

    Outside of a process's main thread, which alone may listen to signals, it never rings.
    """
    bell: Any = ray.remote(num_cpus=0)(Bell).remote()
    if threading.current_thread() is not threading.main_thread():
        yield bell
        return
    asked, over = threading.Event(), threading.Event()

    def pass_on() -> None:
        while not over.is_set():
            if asked.wait(0.2):
                ray.get(bell.ring.remote())
                return

    former = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    thread = threading.Thread(target=pass_on, daemon=True)
    thread.start()
    try:
        yield bell
    finally:
        signal.signal(signal.SIGTERM, former)
        over.set()
        thread.join()
