"""Signals as a terminal starts a process with them, though the suite runs under nohup or as a script's job."""

from __future__ import annotations

import signal

from common.signals import STOPS

for stop in STOPS:
    if signal.getsignal(stop) is signal.SIG_IGN:
        # Goes on ignoring it here; what the tests start does not inherit a handler, as it would SIG_IGN.
        signal.signal(stop, lambda number, frame: None)
