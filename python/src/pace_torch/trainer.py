"""PACE in transformers' `Trainer`. The loss is `compute_loss_func=model.pace.compute_loss`; this is for what Trainer saves."""

from pathlib import Path
from typing import Optional

import torch
from transformers import TrainerCallback

from . import checkpoint
from ._library import PaceError
from .inject import load_trainable_state_dict, trainable_state_dict, unwrapped


FILE = "pace.pt"


def _saved(path: Path) -> dict:
    """What a file has that `PaceCallback` wrote. Raises `PaceError` for any other, and `OSError` if it cannot be opened."""
    saved = checkpoint.load(path)
    if not isinstance(saved, dict) or saved.keys() != {"controller", "trained"}:
        raise PaceError(f"{path} is not what `PaceCallback` writes")
    return saved


def last_checkpoint(output_dir) -> Optional[str]:
    """The newest of Trainer's checkpoints that is whole, or `None`: what to give to `train(resume_from_checkpoint=...)`.

    `True` there takes the newest that there is, also one that Trainer was writing when the run ended.
    """
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    for folder in sorted(folders, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        try:
            _saved(folder / FILE)  # Written when all else is.
            return str(folder)
        except (FileNotFoundError, PaceError):
            pass
    return None


class PaceCallback(TrainerCallback):
    """Keeps what a run needs to be resumed, and its best model, in `pace.pt` of each of Trainer's checkpoints.

    These are where the noise and the variants are (`Pace.state_dict`), which Trainer does not know of, and, but for FSDP, what is
    trained: transformers 5 renames the weights of some models when it saves them, and does not find them when it resumes.

    `folder` is the checkpoint that is resumed from, if it is not in `output_dir`.
    """

    def __init__(self, folder: Optional[str] = None):
        self.folder = folder

    def on_save(self, args, state, control, model=None, **kwargs):
        saved = {"controller": unwrapped(model).pace.state_dict(), "trained": None if args.fsdp else trainable_state_dict(model)}
        if state.is_world_process_zero:
            checkpoint.save(Path(args.output_dir, f"checkpoint-{state.global_step}", FILE), saved)
        if args.world_size > 1:
            torch.distributed.barrier()  # The others may read it next, as the best of all.

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if args.label_smoothing_factor != 0:
            raise PaceError("`label_smoothing_factor` has no effect beside `compute_loss_func`: give `label_smoothing` to `inject`")
        if state.global_step > 0:
            saved = self._load(model, self.folder or Path(args.output_dir, f"checkpoint-{state.global_step}"))
            unwrapped(model).pace.load_state_dict(saved["controller"])

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load(model, state.best_model_checkpoint)

    def _load(self, model, folder) -> dict:
        path = Path(folder, FILE)
        if not path.exists():
            raise PaceError(f"there is no {path}: resume from a checkpoint that was written with `PaceCallback`, and name it "
                            "(`PaceCallback(folder)`) if it is not in `output_dir`. If the run ended while it was written, resume from "
                            "`last_checkpoint(output_dir)`")
        saved = _saved(path)
        if saved["trained"] is not None:
            load_trainable_state_dict(model, saved["trained"])
        return saved
