"""Being asked to stop: SIGTERM from a scheduler or a person, SIGUSR1 from SLURM's --signal."""

import os
import signal
import threading
import time

STOP = (signal.SIGTERM, signal.SIGUSR1)
EXIT_CODE = 128 + signal.SIGTERM  # what a shell says of a program that SIGTERM ended


class StopSignals:
    """`with StopSignals() as stop:` the first signal makes stop.asked true, the next ends the process at once.

    What comes within a second of the first is the same request: a scheduler signals all processes, and torchrun passes
    on to its ranks what it got itself.
    A thread reads them, since Python's own handlers wait while the main thread waits for other ranks. In a thread that
    is not the main one nothing is changed.
    """

    def __init__(self):
        self.asked = False
        self.before = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, lambda *_: None) for number in STOP}
            out, self.pipe = os.pipe()
            os.set_blocking(self.pipe, False)
            self.fd_before = signal.set_wakeup_fd(self.pipe, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(out,), daemon=True).start()
        return self

    def __exit__(self, *_):
        if self.before:
            signal.set_wakeup_fd(self.fd_before)
            for number, handler in self.before.items():
                signal.signal(number, handler)
            os.close(self.pipe)  # ends the thread

    def _watch(self, out: int) -> None:
        first = None
        with open(out, "rb", buffering=0) as numbers:
            while number := numbers.read(1):
                if number[0] in STOP:
                    self.asked, first = True, first or time.monotonic()
                    if time.monotonic() - first > 1:
                        os._exit(EXIT_CODE)
