"""torchrun, tied to the life of the head that started it. A script, never imported: ``agent.py HEAD_PID SCRATCH ARGS``.

The process asks the kernel for a SIGTERM at its parent's death and then is torchrun with the rest of its arguments,
alone in a rendezvous that is a file in SCRATCH, a folder that is removed at the end.
It ends with 0 when the worker ended by itself with 0 or the agent was told to end, and with the worker's exit code
when that has no restart left, without torchrun's page of traceback.
"""

import ctypes
import logging
import os
import shutil
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> int:
    head_pid, scratch, *arguments = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(head_pid):
        return 0  # it died before we could ask to be told
    from torch.distributed.elastic.multiprocessing.api import SignalException  # noqa: TID251 - torchrun, no group
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # noqa: TID251
    from torch.distributed.run import main as torchrun  # noqa: TID251

    logging.disable(logging.ERROR)  # what there is to say, the worker says, or we do below
    rendezvous = [
        "--rdzv-backend",
        "c10d",
        "--rdzv-conf",
        "store_type=file",
        "--rdzv-endpoint",
        f"{scratch}/rendezvous",
    ]
    try:
        torchrun([*rendezvous, "--log-dir", scratch, "--monitor-interval", "0.3", *arguments])
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        print(f"the worker ended with {code} and has no restart left", flush=True)
        return code if 0 < code < 256 else 1
    except SignalException as error:
        return 0 if error.sigval == signal.SIGTERM else 128 + error.sigval
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # all is closed; to take torch apart module by module would need seconds
