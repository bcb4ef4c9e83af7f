"""torchrun that ends with the exit code of what it ran: `python -m arra.train.launch ...`.

The arguments, and the variables `PET_...`, are torchrun's own. torchrun itself ends with 1 whatever
happened, so that a scheduler could not tell a run that was asked to stop, and will go on, from a
mistake. Codes (docs/multi-node.md): 0 = done; 75 = asked to stop by SIGTERM, here or elsewhere;
else that of the worker that failed first: 2 = wrong use, 1 = failed, 128 + n = killed by signal n.
"""

import os
import signal
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from arra.train.signs import PREEMPTED


def launch(arguments: Sequence[str] | None = None) -> int:
    """Runs torchrun with `arguments`, by default those of the process; returns the exit code.

    A stop is answered before the workers' codes are known: whether their state was saved in time or
    not, the same command goes on from the last checkpoint.
    """
    # Agents share one store otherwise, whose address those that stay keep and never tell again: a
    # machine that joins later waits for it in vain (torch 2.13, dynamic_rendezvous.py; seen here,
    # and pytorch/pytorch#135712 for restarts).
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    try:
        torchrun(arguments)
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        code = first.exitcode if first.exitcode >= 0 else 128 - first.exitcode
        print(f"arra: process {rank} ended with {code}, and so all of them", file=sys.stderr)
        return code
    except SignalException as error:
        asked = error.sigval == signal.SIGTERM
        print(f"arra: asked to stop by {error.sigval.name}", file=sys.stderr)
        return PREEMPTED if asked else 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(launch())
