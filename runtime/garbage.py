"""Python's collector of cyclic garbage, set up for a process that serves for days and must never stop for long.

A full collection looks at every container in the process. Torch and its like leave hundreds of thousands that never go
away, and a young collection is due whenever 700 containers more are alive than before, which rows and blocks of running
sequences reach at once. What is there when serving begins is therefore taken out of the collector's sight, and young
collections are made rare. Garbage in cycles (an exception's frames, a closed connection) is still found, a little later; a full
collection practically never comes by itself, so whoever leaves much memory in a cycle asks for one when nothing is served (`collect`).
"""

import gc

_YOUNG_OBJECTS = 50_000


def settle() -> None:
    """Call it once everything is imported, before the first request."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS, 20, 20)


def collect() -> None:
    """All of it, now. Not while something is served: it stops every thread."""
    gc.collect()
