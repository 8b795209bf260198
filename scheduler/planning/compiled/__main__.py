"""``python -m scheduler.planning.compiled``: fill the cache on disk, behind everything else on this host, for the process that started this."""

import os

from runtime.lifeline import watch
from runtime.priority import Priority
from scheduler.planning.compiled import load

if __name__ == "__main__":
    os.nice(19)
    Priority().give_way(gives_way=True)
    watch(os.getppid(), lambda: os._exit(1))
    load().compile_all()
