"""停的信号：头一个记下，以后的不改它；进程之间送得过去。"""

from __future__ import annotations

import pickle
import signal

import pytest

from util.signals import STOPS, Interrupted, catch_signals


@pytest.mark.parametrize("first", STOPS)
def test_the_first_signal_stays(first: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(number) for number in STOPS]
    with catch_signals() as stop:
        stop.check()
        for number in (first, *STOPS):
            signal.raise_signal(number)
        with pytest.raises(Interrupted, match=first.name) as stopped:
            stop.check()
    assert stop.signum == stopped.value.signum == first
    assert [signal.getsignal(number) for number in STOPS] == before
    assert capfd.readouterr().err.count("stopping at the next safe point") == 1
    sent = pickle.loads(pickle.dumps(stopped.value))  # noqa: S301  各进程之间就是这样送的
    assert (sent.signum, str(sent)) == (first, first.name)
