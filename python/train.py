"""Fine-tunes a timm vision transformer or Swin with PACE, its variants or the plain adapters.

    python train.py                                          # MNIST to Optdigits, 16 shots per class, shipped weights
    python train.py --variant fast --out results/fast
    python train.py --data FOLDER --model vit_base_patch16_224.augreg_in21k --pretrained --epochs 300
    torchrun --nproc-per-node 4 train.py ...                 # the same batches, noise and losses in four processes

A run is a pure function of its settings: the order of the data of (seed, epoch), the noise of (seed, step). It is saved
after each epoch, and at the next step after SIGTERM or Ctrl-C; `--resume` goes on as if nothing had happened, whatever
ended it. OUT/metrics.jsonl has a line per training step and per evaluation, OUT/checkpoint.pt the state, in which
`weights` are the trained parameters by their official names. OUT/checkpoint.previous.pt is the one before, from which
`--resume` goes on, and says so, if the newest is not whole; that is kept as OUT/checkpoint.damaged.pt.
"""

import argparse
import contextlib
import functools
import gzip
import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

# PyTorch's threads and the operators' take turns on the CPU: the idle ones must not spin. Read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from timm.scheduler import CosineLRScheduler
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchvision.transforms import functional as image_ops
from tqdm import tqdm

import pace_torch
from pace_torch import checkpoint

SHIPPED = Path(__file__).resolve().parents[1] / "examples" / "few_shot"
# The source model of the few-shot example, pre-trained on MNIST.
DIGITS_WEIGHTS = SHIPPED / "mnist_vit.safetensors"
DIGITS_VIT = dict(
    model_name="vit_tiny_patch16_224", img_size=28, patch_size=4, in_chans=1, embed_dim=64, depth=6, num_heads=4,
    pretrained_cfg_overlay=dict(input_size=(1, 28, 28), mean=(0.5,), std=(0.5,)),
)
EVALUATION_BATCH = 256


class InputError(Exception):
    """What the user can put right, in a sentence."""


def last_line(error: Exception) -> str:
    """The end of a message: what is wrong, without the list or the traceback before it."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])

    def at_least(minimum, kind):
        def number(text):
            if not (value := kind(text)) >= minimum:
                raise argparse.ArgumentTypeError(f"{text} is below {minimum}")
            return value

        return number

    def add(name, help, default=None, to=parser, **kind):
        if default is not None:
            kind["default"], help = default, f"{help} (default {default})"
        to.add_argument(name, help=help, **kind)

    natural, positive = at_least(0, int), at_least(1, int)
    add("--data", "folder of train/CLASS/IMAGE and val/CLASS/IMAGE, or optdigits", "optdigits")
    add("--shots", "optdigits: training images per class, the others validate (default 16)", type=positive)
    add("--model", "name in timm; digits is the few-shot example's ViT, with its weights", "digits")
    source = parser.add_mutually_exclusive_group()
    add("--pretrained", "take timm's weights of the model", to=source, action="store_true")
    add("--weights", "take the weights in this file, safetensors or torch; the head starts anew", to=source)
    add("--variant", "what to train", "pace", choices=["baseline", "noise", "pace", "fast", "lazy"])
    add("--adapter", "kind of adapter", "LoRAmul_VPTadd", choices=["LoRAmul_VPTadd", "LoRAadd", "VPTadd"])
    add("--rank", "rank of the adapters", 10, type=positive)
    add("--sigma", "standard deviation of the noise in the first noisy block", 1.0, type=float)
    add("--lambda", "strength of the consistency", 0.1, type=float, dest="lambda_", metavar="LAMBDA")
    add("--lazy-interval", "lazy: every so many steps have the consistency term", 2, type=positive)
    add("--drop-path", "rate of DropPath in the last block", 0.1, type=float)
    add("--batch", "images in a step, of all processes together", 64, type=positive)
    add("--epochs", "passes over the training images", 100, type=positive)
    add("--lr", "peak learning rate of AdamW", 1e-3, type=float)
    add("--weight-decay", "weight decay of AdamW", 1e-4, type=float)
    add("--label-smoothing", "label smoothing of the cross-entropy", 0.0, type=float)
    add("--eval-every", "evaluate after every so many epochs, and after the last", 10, type=positive)
    add("--seed", "seed of everything that is drawn", 42, type=natural)
    add("--out", "folder of the results (default results/pytorch/VARIANT)", type=Path)
    add("--resume", "go on with the run in OUT, or start it if there is none", action="store_true")
    add("--device", "auto is cuda where there is one", "auto", choices=["auto", "cpu", "cuda"])
    add("--threads", "threads of a process on the CPU", type=positive)
    add("--amp", "compute in bfloat16 where autocast does", action="store_true")
    add("--compile", "torch.compile the model", action="store_true")
    args = parser.parse_args(arguments)
    if args.model == "digits" and args.pretrained:
        parser.error("--pretrained needs a --model of timm's; the weights of `digits` are there already")
    if args.data == "optdigits":
        args.shots = args.shots or 16
    elif args.shots:
        parser.error("--shots is for optdigits; a folder has its own train/ and val/")
    args.out = args.out or Path("results/pytorch") / args.variant
    return args


class Process:
    """This process, one of those that torchrun started or the only one, and its device."""

    def __init__(self, device: str):
        self.rank, self.number = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        cuda = torch.cuda.is_available()
        if device == "cuda" and not cuda:
            raise InputError("--device cuda: PyTorch finds no CUDA device")
        self.device = torch.device("cpu")
        if cuda and device != "cpu":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
        if self.number > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    def sums(self, *numbers: float) -> list[float]:
        """Each number summed over the processes."""
        values = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        if self.number > 1:
            dist.all_reduce(values)
        return values.tolist()

    def barrier(self) -> None:
        if self.number > 1:
            dist.barrier()


# ---------------------------------------------------------------------------------------------------- model and data


def load_model(args: argparse.Namespace) -> torch.nn.Module:
    """The source model, pre-trained if the settings say from what."""
    weights = args.weights or (DIGITS_WEIGHTS if args.model == "digits" else None)
    kind = DIGITS_VIT if args.model == "digits" else dict(model_name=args.model)
    try:
        model = timm.create_model(**kind, pretrained=args.pretrained, drop_path_rate=args.drop_path)
    except (RuntimeError, TypeError, OSError) as error:
        raise InputError(f"--model {args.model}: {last_line(error)}") from error
    if weights and not Path(weights).is_file():
        raise InputError(f"--weights {weights}: no such file")
    if weights:
        try:
            given = timm.models.load_state_dict(str(weights))
            given = {name: tensor for name, tensor in given.items() if not name.startswith("head")}
            missing, unexpected = model.load_state_dict(given, strict=False)
        except Exception as error:  # Whatever the readers of two formats raise for any file at all.
            raise InputError(f"{weights} cannot be read as weights of {args.model}: {last_line(error)}") from error
        if wrong := unexpected + [name for name in missing if not name.startswith("head")]:
            raise InputError(f"{weights} has not the weights of {args.model}: {wrong[0]} is in one of them only")
    return model


class Indexed(Dataset):
    """The images at `indices` of a data set, as (image, label, number among these)."""

    def __init__(self, images: Dataset, indices):
        self.images, self.indices = images, indices

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        return *self.images[self.indices[i]], i


def load_optdigits(shots: int, seed: int, channels: int, size: tuple[int, int]):
    """Training and validation set, classes. Images `[channels, *size]`, 0 to 1, prepared as in the few-shot example."""

    def idx(kind: str) -> np.ndarray:
        with gzip.open(SHIPPED / "data" / f"optdigits-{kind}-ubyte.gz") as file:
            data = file.read()
        sizes = np.frombuffer(data, ">u4", count=data[3], offset=4)
        return np.frombuffer(data, np.uint8, offset=4 + sizes.nbytes).reshape(sizes)

    images, labels = torch.tensor(idx("images-idx3"))[:, None] / 16, idx("labels-idx1").astype(np.int64)
    bicubic = dict(mode="bicubic", antialias=True)
    images = F.pad(F.interpolate(images, 20, **bicubic).clamp(0, 1), (4, 4, 4, 4))  # The format of MNIST.
    if images.shape[2:] != size:
        images = F.interpolate(images, size, **bicubic).clamp(0, 1)
    images = TensorDataset(images.expand(-1, channels, -1, -1), torch.from_numpy(labels))
    order = np.random.default_rng(seed).permutation(len(labels))
    by_class = [order[labels[order] == digit] for digit in range(10)]
    if shots >= min(map(len, by_class)):
        raise InputError(f"--shots {shots}: there is a class of {min(map(len, by_class))} images, one must validate")
    parts = [of_class[:shots] for of_class in by_class], [of_class[shots:] for of_class in by_class]
    return *(Indexed(images, np.concatenate(part)) for part in parts), 10


# Not within `load_folder`: workers that are not forked, as on macOS and from Python 3.14 on, are sent these by their names.


def load_image(path: str):
    try:
        return torchvision.datasets.folder.default_loader(path)
    except Exception as error:  # Whatever decoders raise for a broken file.
        raise OSError(f"{path}: {error}") from error


def prepare_image(channels: int, size: tuple[int, int], image) -> torch.Tensor:
    image = image_ops.resize(image, size, torchvision.transforms.InterpolationMode.BICUBIC)
    return image_ops.pil_to_tensor(image.convert("L") if channels == 1 else image)


def load_folder(folder: Path, channels: int, size: tuple[int, int]):
    """Training and validation set, classes. Images `[channels, *size]` of bytes, stretched as in the official code."""
    for part in ("train", "val"):
        if not (folder / part).is_dir():
            raise InputError(f"no folder {folder / part}, expected it with a folder of images per class")
    prepare = functools.partial(prepare_image, channels, size)
    train, val = (torchvision.datasets.ImageFolder(folder / part, prepare, loader=load_image) for part in ("train", "val"))
    if train.classes != val.classes:
        only = sorted(set(train.classes) ^ set(val.classes))
        raise InputError(
            f"--data {folder}: train/ has {len(train.classes)} classes, val/ {len(val.classes)}; not in both: "
            + ", ".join(only)
        )
    return *(Indexed(part, range(len(part))) for part in (train, val)), len(train.classes)


def load_data(args: argparse.Namespace, input_size: tuple[int, int, int]):
    """Training and validation set, classes; images of `input_size`."""
    channels, *size = input_size
    if args.data == "optdigits":
        return load_optdigits(args.shots, args.seed, channels, tuple(size))
    return load_folder(Path(args.data), channels, tuple(size))


class Batches(torch.utils.data.Sampler):
    """This process's part of the batches of `epoch` from `start` on, in an order that depends on (seed, epoch) alone.

    As in the official code an incomplete last batch is left out; fewer images than a batch are one. Process r has the
    r-th of equal slices. Where PACE-lazy uses half of a batch, these are slices of each half.
    """

    def __init__(self, samples: int, args: argparse.Namespace, process: Process):
        self.samples, self.seed, self.process = samples, args.seed, process
        self.lazy_interval = args.lazy_interval if args.variant == "lazy" else None
        divisor = process.number * (2 if self.lazy_interval else 1)
        self.size = min(args.batch, samples) // divisor * divisor
        if self.size == 0:
            raise InputError(f"--batch {args.batch} of {samples} training images: too few to divide by {divisor}")
        self.epoch = self.start = 0

    def __len__(self):
        return self.samples // self.size

    def __iter__(self):
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.samples)
        for i in range(self.start, len(self)):
            batch = order[i * self.size : (i + 1) * self.size]
            halves = self.lazy_interval and (self.epoch * len(self) + i) % self.lazy_interval == 0
            parts = np.split(batch, 2 if halves else 1)
            yield np.concatenate([np.split(part, self.process.number)[self.process.rank] for part in parts]).tolist()


# ---------------------------------------------------------------------------------------------------- state


@contextlib.contextmanager
def stop_signals(processes: int):
    """A list that is not empty after SIGTERM or Ctrl-C. A second one ends the process at once, if it is the only one:
    torchrun passes on what its processes may have received already."""
    received, before = [], {}

    def handle(number, _):
        received.append(number)
        if processes == 1:
            signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, handle)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_signals_to_the_process(_worker: int) -> None:
    """For workers that load images: torchrun and schedulers signal them too, and their end would be that of the run.

    They live on for a minute, in which the process ends its step; Python, when it exits, ends them by the same signal.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))


def check_settings(path: Path, before: dict, settings: dict) -> None:
    """That a checkpoint is of a run with these settings."""
    changed = [
        f"{name.rstrip('_').replace('_', '-')} was {before.get(name)}, is {settings.get(name)}"
        for name in before | settings
        if before.get(name) != settings.get(name)
    ]
    if changed:
        raise InputError(f"{path}: {'; '.join(changed)}. Resume with the same settings, or take another --out")


# ---------------------------------------------------------------------------------------------------- training


class Evaluation:
    """Accuracy, and FP-distance from the model as it is at the start, when its adapters are the identity."""

    def __init__(self, model: torch.nn.Module, loader: DataLoader, inputs, autocast, process: Process):
        self.model, self.loader, self.inputs, self.autocast, self.process = model, loader, inputs, autocast, process
        self.source = [features for features, *_ in self.outputs()]

    @torch.no_grad()
    def outputs(self):
        """Features before the head, logits and labels, batch by batch."""
        self.model.eval()
        for images, labels, _ in self.loader:
            with self.autocast:
                tokens = self.model.forward_features(self.inputs(images))
                features = self.model.forward_head(tokens, pre_logits=True)
                logits = self.model.forward_head(tokens)
            yield features.float(), logits, labels.to(logits.device)

    def __call__(self) -> dict:
        right = distance = images = 0
        for before, (features, logits, labels) in zip(self.source, self.outputs()):
            right += (logits.argmax(1) == labels).sum().item()
            distance += len(labels) * pace_torch.fp_distance(features, before).item()
            images += len(labels)
        right, distance, images = self.process.sums(right, distance, images)
        return {"accuracy": right / images, "fp_distance": distance / images}


class Run:
    """A model, what trains it, and the step that it is at."""

    def __init__(self, args: argparse.Namespace, process: Process, model: torch.nn.Module, samples: int, classes: int):
        self.args, self.process, self.model, self.step = args, process, model, 0
        model.reset_classifier(classes)
        model.to(process.device)
        pace_torch.inject(
            model, args.adapter, args.rank, sigma=args.sigma, lambda_=args.lambda_, variant=args.variant,
            seed=args.seed, lazy_interval=args.lazy_interval, samples=samples, label_smoothing=args.label_smoothing,
        )
        self.pace, self.parameters = model.pace, [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=args.lr, weight_decay=args.weight_decay)
        # That of the official code for 100 epochs and more. A pure function of the epoch: there is nothing to save.
        self.scheduler = CosineLRScheduler(
            self.optimizer, args.epochs, lr_min=1e-5, warmup_t=min(10, args.epochs // 10), warmup_lr_init=1e-6
        )
        self.batches = Batches(samples, args, process)
        self.last_step = args.epochs * len(self.batches)
        self.autocast = torch.autocast(process.device.type, torch.bfloat16, enabled=args.amp)

    def state(self) -> dict:
        return {
            "step": self.step, "history": self.pace.history, "weights": pace_torch.trainable_state_dict(self.model),
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, state: dict | None) -> None:
        if state:
            self.step, self.pace.history = state["step"], state["history"]
            self.model.load_state_dict(state["weights"], strict=False)
            self.optimizer.load_state_dict(state["optimizer"])
        self.pace.step = self.pace.iteration = self.step

    def engine(self) -> torch.nn.Module:
        """What a training step calls: the model, over the processes and compiled as the settings say."""
        engine, device = self.model, self.process.device
        if self.process.number > 1:
            engine = DistributedDataParallel(engine, device_ids=[device] if device.type == "cuda" else None)
        return torch.compile(engine) if self.args.compile else engine

    def steps(self, engine: torch.nn.Module, loader: DataLoader, inputs, signals: list):
        """Trains to the last step. After each: its epoch, its metrics, and whether a process is told to stop."""
        for epoch in range(self.step // len(self.batches), self.args.epochs):
            self.scheduler.step(epoch)
            self.batches.epoch, self.batches.start = epoch, self.step % len(self.batches)
            start = time.perf_counter()
            for images, *others in loader:
                metrics, stop = self.train_on(engine, inputs(images), *others, signals)
                yield epoch, metrics | {"seconds": time.perf_counter() - start}, stop
                start = time.perf_counter()

    def train_on(self, engine: torch.nn.Module, images, labels, index, signals: list) -> tuple[dict, bool]:
        """One step: its metrics, and whether a process is told to stop."""
        device = self.process.device
        self.model.train()
        # What draws from PyTorch's generator (timm's DropPath, in the baseline) draws the same after a resume.
        seed = np.random.SeedSequence((self.args.seed, self.step, self.process.rank)).generate_state(1)[0]
        torch.manual_seed(int(seed))
        with self.autocast:
            losses = self.pace.training_step(engine, images, labels.to(device), index.to(device))
        self.optimizer.zero_grad()
        losses.total.backward()
        norm = pace_torch.grad_norm([p.grad for p in self.parameters])
        self.optimizer.step()
        losses.check()
        self.step += 1
        names = ("total", "classification", "consistency")
        values = (getattr(losses, name).item() / self.process.number for name in names)
        *values, stop = self.process.sums(*values, len(signals))
        metrics = dict(zip(names, values))
        return metrics | {"gradient_norm": norm.item(), "lr": self.optimizer.param_groups[0]["lr"]}, stop > 0


class Results:
    """The files in OUT: the log, and two checkpoints, each of which says how much of the log it goes with.

    `state` is that of the newest checkpoint that is whole, if there is any; `passed_over` says why it is not checkpoint.pt.
    """

    def __init__(self, folder: Path, settings: dict, resume: bool):
        self.settings, self.log = settings, folder / "metrics.jsonl"
        self.checkpoint, self.previous = folder / "checkpoint.pt", folder / "checkpoint.previous.pt"
        if self.log.exists() and not resume:
            raise InputError(f"{folder} has a run already: go on with it by --resume, or take another --out")
        self.passed_over, self.state = None, None
        try:
            self.state = self.read(self.checkpoint)
        except (pace_torch.PaceError, FileNotFoundError) as error:
            damaged = not isinstance(error, FileNotFoundError)
            if self.previous.exists():
                self.passed_over = str(error) if damaged else f"there is no {self.checkpoint}: its writing was cut off"
                self.state = self.read(self.previous)
            elif damaged:
                raise

    def read(self, path: Path) -> dict:
        state = checkpoint.load(path)
        if not isinstance(state, dict) or "settings" not in state:
            raise pace_torch.PaceError(f"{path} is not a checkpoint of this script")
        check_settings(path, state["settings"], self.settings)
        if state["log_length"] > (self.log.stat().st_size if self.log.exists() else 0):
            raise pace_torch.PaceError(f"{self.log} is shorter than when {path} was written")
        return state

    def create(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.touch()
        if self.passed_over:
            # It may be the disk that failed, and not the file.
            if self.checkpoint.exists():
                self.checkpoint.replace(self.checkpoint.with_suffix(".damaged.pt"))
            self.previous.replace(self.checkpoint)  # The next one shall not take the place of the only one.
        os.truncate(self.log, self.state["log_length"] if self.state else 0)  # What came after it comes again.

    def save(self, state: dict, log) -> None:
        """Writes the checkpoint that goes with the log, which is open, up to here."""
        try:
            os.fsync(log.fileno())
            checkpoint.save(self.checkpoint, {"settings": self.settings, "log_length": log.tell(), **state}, self.previous)
        except OSError as error:
            raise InputError(f"{self.checkpoint} cannot be written, and is that before step {state['step']}: {error}") from error


def normalization(expected: dict, device: torch.device):
    """The function that makes images of bytes or of 0 to 1 into what a model of this configuration takes."""
    mean, std = (torch.tensor(expected[name], device=device).view(-1, 1, 1) for name in ("mean", "std"))

    def inputs(images: torch.Tensor) -> torch.Tensor:
        images = images.to(device, non_blocking=True)
        return ((images / 255 if images.dtype == torch.uint8 else images) - mean) / std

    return inputs


def loaders(args: argparse.Namespace, process: Process, batches: Batches, training: Dataset, validation: Dataset):
    """This process's batches of training images, and its part of the validation images."""
    loading = dict(
        num_workers=0 if args.data == "optdigits" else min(4, os.cpu_count()),
        worker_init_fn=leave_signals_to_the_process, pin_memory=process.device.type == "cuda",
    )
    own = Subset(validation, range(process.rank, len(validation), process.number))
    return DataLoader(training, batch_sampler=batches, **loading), DataLoader(own, EVALUATION_BATCH, **loading)


def describe(run: Run, training: Dataset, validation: Dataset, classes: int) -> str:
    args, process = run.args, run.process
    trained, all_of_them = (sum(p.numel() for p in group) for group in (run.parameters, run.model.parameters()))
    return (
        f"{args.data}: {len(training)} training and {len(validation)} validation images, {classes} classes\n"
        f"{args.model}: {trained:,} of {all_of_them:,} parameters train, on {process.number} x {process.device.type}"
        + (f", from step {run.step}" if run.step else "")
    )


def train(args: argparse.Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    process = Process(args.device)
    main_process = process.rank == 0
    torch.manual_seed(args.seed)
    model = load_model(args)
    expected = timm.data.resolve_model_data_config(model)
    training, validation, classes = load_data(args, expected["input_size"])
    run = Run(args, process, model, len(training), classes)
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "resume", "device", "threads")}
    settings |= {"classes": classes, "training images": len(training), "steps in an epoch": len(run.batches)}
    results = Results(args.out, settings, args.resume)

    inputs = normalization(expected, process.device)
    training_loader, validation_loader = loaders(args, process, run.batches, training, validation)
    evaluate = Evaluation(model, validation_loader, inputs, run.autocast, process)  # Before the weights are restored.
    run.restore(results.state)
    process.barrier()  # Every process has seen the files as they were.
    if main_process:
        results.create()
        if results.passed_over:
            print(f"{results.passed_over}; goes on from {results.previous}")
        print(describe(run, training, validation, classes))
    engine = run.engine()
    with (
        stop_signals(process.number) as signals,
        open(results.log if main_process else os.devnull, "a") as metrics,
        tqdm(total=run.last_step, initial=run.step, unit="step", disable=None if main_process else True) as progress,
    ):

        def record(epoch, values):
            metrics.write(json.dumps({"step": run.step, "epoch": epoch + 1, **values}) + "\n")
            metrics.flush()

        for epoch, values, stop in run.steps(engine, training_loader, inputs, signals):
            record(epoch, values)
            progress.update()
            progress.set_postfix(epoch=epoch + 1, loss=f"{values['total']:.3f}", refresh=False)
            end = run.step % len(run.batches) == 0
            if end and ((epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs):
                start = time.perf_counter()
                record(epoch, evaluate() | {"seconds": time.perf_counter() - start})
            if main_process and (end or stop):
                results.save(run.state(), metrics)
            if stop and run.step < run.last_step:
                process.barrier()  # torchrun ends all with the first: not before the checkpoint is there.
                sys.exit(f"stopped after step {run.step} of {run.last_step}; --resume goes on" if main_process else 1)
    if main_process:
        print_table(args.variant, results.log)


def print_table(variant: str, log: Path) -> None:
    """The last loss and evaluation, and the time of all training steps."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    steps, last = [line for line in lines if "total" in line], lines[-1]
    print(f"{'variant':<10}{'loss':>8}{'accuracy':>10}{'FP-distance':>13}{'seconds':>9}")
    print(
        f"{variant:<10}{steps[-1]['total']:>8.3f}{100 * last['accuracy']:>8.1f} %{last['fp_distance']:>13.3f}"
        f"{sum(line['seconds'] for line in steps):>9.1f}"
    )


def end_workers() -> None:
    """Ends workers that load images, which the traceback of an error holds: they would live on for a minute when Python ends them."""
    if workers := multiprocessing.active_children():
        # PyTorch takes their end for an error.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in workers:
            worker.kill()
            worker.join()


def main(arguments: list[str] | None = None) -> None:
    try:
        train(parse(arguments))
    except (InputError, pace_torch.PaceError, OSError) as error:
        sys.exit(f"train.py: {last_line(error)}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        end_workers()


if __name__ == "__main__":
    main()
