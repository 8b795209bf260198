"""Workers of this environment treat the processor as a device whose work is queued: the path of CUDA, but for graphs and streams.

Python imports this when it starts with this folder on PYTHONPATH. What it changes is changed when `runtime.loading` has been imported, which only
workers do.
"""

import importlib.machinery
import importlib.util
import sys


class _AfterLoading:
    """Finds `runtime.loading` as usual, and has it changed at the end of its import."""

    def find_spec(self, name, path, target=None):
        if name != "runtime.loading":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            _change(module)

        spec.loader.exec_module = exec_module
        return spec


def _change(loading):
    import contextlib
    import queue
    import threading

    import runtime.stage
    from kvstore.page_memory import HostMemory
    from runtime.cuda.runner import Runner
    from runtime.limiter import Accelerator
    from runtime.messages import MIN_FREE_BYTES
    from runtime.sampling import sample_queued

    class Waiting(Runner):
        """What leaves is waited for, as from a device."""

        def finish(self, hidden, meanwhile=lambda: None):
            out = hidden.clone()
            meanwhile()
            return out

    class Copies:
        """Hands tensors on in a thread of its own, in order."""

        is_full = False

        def __init__(self):
            self._queue = queue.SimpleQueue()
            threading.Thread(target=self._hand_on, daemon=True).start()

        def to_host(self, tensor, then):
            self._queue.put((tensor.clone(), then))

        def to_device(self, tensor):
            return tensor.clone()

        def measure(self):
            return Accelerator(2e10, 1e10)

        def _hand_on(self):
            while True:
                tensor, then = self._queue.get()
                then(tensor)

    class Queued:
        """Stands in for `runtime.cuda.device.Queued`."""

        def __init__(self, memory):
            self.runner, self.copies, self._memory = Waiting(_CPU), Copies(), memory

        def settle_thread(self):
            print("queued: steps go through a runner", file=sys.stderr, flush=True)

        def loading(self):
            return contextlib.nullcontext()

        def budget(self, spec, block_size, implementation):
            return self._memory()[1] - MIN_FREE_BYTES

        def memory(self, capacity):
            return HostMemory(capacity)

        def _nothing(self, *what):
            pass

        drop_pool = pool_made = capture = retain = _nothing

    import torch

    _CPU = torch.device("cpu")
    build = loading.Loader.__init__

    def init(self, device):
        build(self, device)
        self.queued = Queued(device.memory)
        self.units.runner = self.queued.runner

    plan, said = runtime.stage.Stage.plan_ahead, set()

    def plan_ahead(self, step, hop):
        where = "a later hop" if hop else "the first hop"
        if where not in said:
            said.add(where)
            print(f"queued: {where} planned a step ahead", file=sys.stderr, flush=True)
        plan(self, step, hop)

    runtime.stage.Stage.plan_ahead = plan_ahead
    loading.Loader.__init__ = init
    runtime.stage.sample = sample_queued


sys.meta_path.insert(0, _AfterLoading())
