"""Whether the processes of a run draw the noise of the same steps."""

import itertools
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from ._errors import PaceError

if TYPE_CHECKING:
    from .controller import Pace

INTERVAL = 50
_numbers = itertools.count()
_calls: "WeakKeyDictionary[Pace, list[int]]" = WeakKeyDictionary()


def check_in_step(pace: "Pace") -> None:
    """Raises `PaceError` if a neighbouring process was at another step of the noise in the same call of this function.

    At the first call, the second and each 50th, a process leaves its step in the store of the process group and reads what the
    processes of the next and the previous rank have left. Nobody waits, so of two that differ the later one finds it out.
    """
    if torch.compiler.is_compiling() or pace.shard is not None or not dist.is_available() or not dist.is_initialized():
        return
    # Not in the controller, so that a copy starts anew. Processes come to their models in the same order.
    if pace not in _calls:
        _calls[pace] = [next(_numbers), 0]
    _calls[pace][1] += 1
    model, call = _calls[pace]
    if call > 2 and call % INTERVAL or torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return
    rank, world_size = dist.get_rank(), dist.get_world_size()
    try:
        store = dist.PrefixStore(f"pace_torch/{model}", dist.distributed_c10d._get_default_store())
        store.set(str(rank), f"{call} {pace.step}")
        others = {str((rank + i) % world_size) for i in (-1, 1)}
        left = {other: store.get(other).decode().split() for other in others if store.check([other])}
    except (AttributeError, RuntimeError):
        return  # Older PyTorch, or a store that cannot do this.
    for other, (their_call, their_step) in left.items():
        if int(their_call) == call and int(their_step) != pace.step:
            raise PaceError(f"process {rank} is at step {pace.step} of the noise and process {other} at step {their_step}, after {call} "
                            "losses in each: one has run the model in training more often than the other, or starts elsewhere")
