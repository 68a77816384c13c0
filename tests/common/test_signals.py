from __future__ import annotations

import os
import signal

import pytest

from common.errors import Stopped
from common.signals import StopFlag


def test_the_first_signal_asks_and_the_second_insists() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopFlag() as flag:
        flag.raise_if_requested("nothing")
        os.kill(os.getpid(), signal.SIGTERM)
        assert flag.stop_requested
        with pytest.raises(Stopped, match="3 of 4 shards"):
            flag.raise_if_requested("3 of 4 shards are committed")
        with pytest.raises(Stopped, match="second SIGINT"):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before
