"""Random layouts, of every kind that there is. Pure.

A layout is written as ``POST /admin/layout`` takes it: ``[{"worker": NAME, "layers": [START, STOP]}, ...]``.
"""

import itertools
import random
from collections.abc import Sequence
from typing import Any

Stages = list[dict[str, Any]]
KINDS = ("boundary", "cut", "grow", "shrink", "replace", "two segments", "empty end", "any")


def random_layout(draw: random.Random, present: Stages, workers: Sequence[str], num_layers: int) -> tuple[str, Stages]:
    """A layout that is not `present`, and its kind: what kind of change leads there."""
    while True:
        kind = draw.choice(KINDS)
        stages = _make(kind, draw, present, list(workers), num_layers)
        if stages is not None and stages != present:
            return kind, stages


def _make(kind: str, draw: random.Random, present: Stages, workers: list[str], num_layers: int) -> Stages | None:
    """None when this kind does not exist from here."""
    chain = [stage["worker"] for stage in present]
    names = list(dict.fromkeys(chain))
    idle = [name for name in workers if name not in names]
    bounds = [stage["layers"][0] for stage in present[1:]]
    match kind:
        case "boundary":  # one boundary, a layer or two
            if not bounds:
                return None
            index = draw.randrange(len(bounds))
            bounds[index] += draw.choice((-2, -1, 1, 2))
            return _stages(chain, bounds, num_layers)
        case "cut":  # the same chain, cut anew
            return _stages(chain, _cuts(draw, len(chain), num_layers), num_layers)
        case "grow":
            if not idle:
                return None
            chain.insert(draw.randint(0, len(chain)), draw.choice(idle))
            return _stages(chain, _cuts(draw, len(chain), num_layers), num_layers)
        case "shrink":
            gone = draw.choice(names)
            chain = [name for name in chain if name != gone]
            chain = [name for i, name in enumerate(chain) if i == 0 or chain[i - 1] != name]
            return _stages(chain, _cuts(draw, len(chain), num_layers), num_layers) if chain else None
        case "replace":  # the layers stay as they are cut, an idle worker takes one worker's
            if not idle:
                return None
            gone, new = draw.choice(names), draw.choice(idle)
            return _stages([new if name == gone else name for name in chain], bounds, num_layers)
        case "two segments":
            if len(workers) < 2:
                return None
            chosen = draw.sample(workers, draw.randint(2, len(workers)))
            chain = [*chosen, draw.choice(chosen[:-1])]
            return _stages(chain, _cuts(draw, len(chain), num_layers), num_layers)
        case "empty end":  # a worker with the embedding or the LM head alone
            chosen = draw.sample(workers, draw.randint(min(2, len(workers)), len(workers)))
            if len(chosen) < 2:
                return None
            inner = _cuts(draw, len(chosen) - 1, num_layers)
            bounds = [0, *inner] if draw.random() < 0.5 else [*inner, num_layers]
            return _stages(chosen, bounds, num_layers)
        case _:
            chosen = draw.sample(workers, draw.randint(1, len(workers)))
            return _stages(chosen, _cuts(draw, len(chosen), num_layers), num_layers)


def _cuts(draw: random.Random, num_stages: int, num_layers: int) -> list[int]:
    """Boundaries between stages that all hold a layer."""
    return sorted(draw.sample(range(1, num_layers), num_stages - 1))


def _stages(chain: Sequence[str], bounds: Sequence[int], num_layers: int) -> Stages | None:
    """None when the boundaries leave a stage in the middle without layers, or run out of the model."""
    edges = [0, *bounds, num_layers]
    for index, (start, stop) in enumerate(itertools.pairwise(edges)):
        if stop < start or (stop == start and 0 < index < len(chain) - 1):
            return None
    return [
        {"worker": name, "layers": [start, stop]} for name, start, stop in zip(chain, edges, edges[1:], strict=False)
    ]
