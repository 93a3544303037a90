"""The analysis child as its worker sees it."""

import psutil

from dicom_node.analyst import Analyst
from dicom_node.messages import Setup


def test_a_worker_keeps_its_lease_while_a_child_is_slow_to_load() -> None:
    analyst = Analyst(Setup("remnant-resnet18-phantom", "native", ("anterior", "posterior"), False))
    beats = 0

    def beat() -> bool:
        nonlocal beats
        assert analyst._child is not None
        child = psutil.Process(analyst._child.pid)
        beats += 1
        # Crowded out for two beats, then running again.
        if beats < 3:
            child.suspend()
        else:
            child.resume()
        return True

    try:
        analyst.start(beat)
        assert beats >= 3
        assert analyst._child is not None
        assert analyst._child.is_alive()
    finally:
        analyst.end()
