"""`torchrun` that lets training save and leave: `python -m megatron_long.launch [torchrun's arguments]`.

Torchrun answers SIGTERM by ending its processes 30 s later and itself with status 1, and SIGUSR1 by dying.
Here both are handed to the processes, and torchrun waits until they have saved; its status is then theirs.
"""

import signal
import sys
from collections.abc import Sequence
from types import FrameType

from megatron_long.training.signals import LEAVE_SIGNALS

OTHER_SIGNALS = "SIGINT,SIGHUP,SIGQUIT"
"""What torchrun goes on handling in its own way."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run torchrun with these arguments."""
    for number in LEAVE_SIGNALS:
        signal.signal(number, _hand_on)
    from torch.distributed import run

    words = list(sys.argv[1:] if argv is None else argv)
    run.main(["--signals-to-handle", OTHER_SIGNALS, *words])


def _hand_on(number: int, frame: FrameType | None) -> None:
    import psutil

    for child in psutil.Process().children():
        child.send_signal(number)


if __name__ == "__main__":
    main()
