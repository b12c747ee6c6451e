"""Signals that end a run."""

import signal
import time

# Ctrl-C, and how clusters announce the end. There is no SIGUSR1 on Windows.
SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, n)]


class Stopped(SystemExit):
    """A signal has ended the run. The exit status is 128 plus its number: 130 for SIGINT, 143 for
    SIGTERM. `go_on` holds a sentence that says how to continue."""

    def __init__(self, signum):
        super().__init__(128 + signum)
        self.signal = signal.Signals(signum).name
        self.go_on = ""


class StopSignals:
    """A context that receives the signals which end a run. They raise `Stopped` at once; after
    `wait` they are only noted in `received`. A second Ctrl-C always ends the run at once."""

    def __enter__(self):
        self.received, self.at, self.waiting = 0, 0.0, False
        self.before = {signum: signal.getsignal(signum) for signum in SIGNALS}
        self._listen()
        return self

    def __exit__(self, *exception):
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def wait(self):
        """From now on only note signals: a callback looks at `received` and ends the run."""
        self.waiting = True
        self._listen()  # Lightning has put handlers of its own in the place of these

    def _listen(self):
        for signum in SIGNALS:
            signal.signal(signum, self._receive)

    def _receive(self, signum, frame):
        # Launchers pass a Ctrl-C on, which comes twice then, in the same moment.
        again = signum == signal.SIGINT == self.received and time.monotonic() - self.at > 1
        if again or not self.waiting:
            raise Stopped(signum)
        self.received = self.received or signum
        self.at = time.monotonic()
