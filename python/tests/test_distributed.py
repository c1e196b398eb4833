"""Several processes: 1, 2 and 4 that share a global batch do the same, up to the order of sums, in each of PyTorch's engines."""

import importlib.util
import os
import warnings

import pace_torch
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import close, fork_server, free_port, perturb, vit
from pace_torch import PaceError
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

GLOBAL_BATCH, STEPS, SAMPLES = 8, 4, 12
VARIANTS = ("pace", "fast")


def data(step):
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(GLOBAL_BATCH, 3, 16, 16, generator=generator, dtype=torch.float64)
    labels = torch.randint(5, (GLOBAL_BATCH,), generator=generator)
    return x, labels, torch.randperm(SAMPLES, generator=generator)[:GLOBAL_BATCH]


def train(variant, rank, world_size, wrap=DistributedDataParallel):
    """Trains on a process's part of each batch; what it saw and where it ended."""
    model = pace_torch.inject(
        vit(drop_path_rate=0.5), "LoRAmul_VPTadd", 2, sigma=0.7, variant=variant, samples=SAMPLES, seed=11
    )
    perturb(model, 0.05).train()
    engine = wrap(model) if world_size > 1 else model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    part = slice(rank * GLOBAL_BATCH // world_size, (rank + 1) * GLOBAL_BATCH // world_size)
    local = GLOBAL_BATCH // world_size
    out = {"losses": [], "noise": [], "scale": []}
    for step in range(STEPS):
        x, labels, index = (tensor[part] for tensor in data(step))
        losses = model.pace.training_step(engine, x, labels, index)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        out["losses"].append(torch.stack([losses.total.detach(), losses.classification, losses.consistency]))
        # The z of one layer, and what one DropPath multiplies by: [branch, sample, channel].
        pace, layer = model.pace, model.blocks[2].attn.qkv
        z = pace_torch.noise(pace.noise(layer.layer, layer.sigma, pace.branches * local), local, 72)
        out["noise"].append(z.view(pace.branches, local, 72))
        drop = model.blocks[2].drop_path1
        out["scale"].append(pace.drop_path(drop.layer, drop.drop_prob, torch.ones(local, 1, dtype=torch.float64)))
    out["weights"] = saved(engine)
    out["history"] = model.pace.history
    return out


def fully_sharded(model):
    """FSDP2."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp1(model):
    blocks = ModuleWrapPolicy({type(model.blocks[0])})
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"), auto_wrap_policy=blocks)


class Around(torch.nn.Module):
    """A module with a model in it, as Lightning's, and a parameter that the loss does not use."""

    def __init__(self, net):
        super().__init__()
        self.net, self.unused = net, torch.nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return self.net(x)


ENGINES = {
    "fully_shard": fully_sharded,
    "FSDP1": fsdp1,
    "a module around it": lambda model: DistributedDataParallel(Around(model), find_unused_parameters=True),
}


def saved(engine):
    """What is trained, whole, by the names that the model has alone; in FSDP1 all of it."""
    if isinstance(engine, FullyShardedDataParallel):
        return get_model_state_dict(engine, options=StateDictOptions(full_state_dict=True))
    if isinstance(engine, FSDPModule):
        # There and back.
        weights = {name: weight.clone() for name, weight in pace_torch.trainable_state_dict(engine).items()}
        with torch.no_grad():
            for parameter in engine.parameters():
                parameter.mul_(2.0)
        pace_torch.load_trainable_state_dict(engine, weights)
    return {name.removeprefix("net."): weight for name, weight in pace_torch.trainable_state_dict(engine).items()}


def trainer(rank, world_size, folder):
    """What transformers' Trainer trains with a batch of four, accumulated twice, and what it evaluates and predicts."""
    import transformers
    from pace_torch.trainer import PaceCallback

    if world_size > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(
        image_size=16, patch_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_labels=5))
    model = perturb(pace_torch.inject(model.double(), rank=2, sigma=0.5, lambda_=0.1)).train()
    rows = [{"pixel_values": x, "labels": label} for step in range(2) for x, label in zip(*data(step)[:2])]
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=4 // world_size, gradient_accumulation_steps=2, num_train_epochs=1, max_grad_norm=0.0,
        train_sampling_strategy="sequential", lr_scheduler_type="constant", use_cpu=True, report_to="none", save_strategy="epoch",
        disable_tqdm=True, logging_strategy="no")
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    trainer = transformers.Trainer(model, arguments, compute_loss_func=model.pace.compute_loss, train_dataset=rows, eval_dataset=rows[:3],
                                   optimizers=(sgd, None), callbacks=[PaceCallback])
    trainer.train()
    assert isinstance(trainer.model_wrapped, DistributedDataParallel) == (world_size > 1)
    predictions = trainer.predict(rows[:3]).predictions
    return {"predictions": torch.from_numpy(predictions), **pace_torch.trainable_state_dict(trainer.model_wrapped)}


def check_errors():
    """Of what is in pieces nothing is merged or saved as if it were whole."""
    for wrap in (fully_sharded, fsdp1):
        model = pace_torch.inject(vit(), rank=2)
        for part in (wrap(model), model):
            with pytest.raises(PaceError, match="sharded.*get_model_state_dict"):
                pace_torch.merge(part)
            if wrap is fsdp1:
                with pytest.raises(PaceError, match="FullyShardedDataParallel.*get_model_state_dict"):
                    pace_torch.trainable_state_dict(part)
        with pytest.raises(PaceError, match="wrapped or sharded"):
            pace_torch.inject(wrap(vit()))
    # The linear layer within an adapter is not called: what would gather its weight does not run.
    model = pace_torch.inject(vit(), rank=2).train()
    fully_shard(model.blocks[1].attn.qkv.adapter.base_module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    with pytest.raises(PaceError, match="`blocks.1.attn.qkv`.*fully_shard"):
        model(data(0)[0])


def worker(rank, world_size, port, folder, engines=False):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    if engines:
        results = {name: train("pace", rank, world_size, wrap) for name, wrap in ENGINES.items()}
        if importlib.util.find_spec("transformers"):
            results["Trainer"] = trainer(rank, world_size, folder)
        check_errors()
    else:
        results = {variant: train(variant, rank, world_size) for variant in VARIANTS}
        results["complaints"] = fall_out_of_step(rank)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def fall_out_of_step(rank):
    """The losses, by number, at which each process found that the others are at another step. Nobody waits for a complaint."""
    x, labels, _ = data(0)
    complaints = {}
    for extra in (1, 2, 50):
        model = pace_torch.inject(vit(), rank=2).train()
        for number in range(1, 51):
            if number in (1, 2, 50):
                dist.barrier()
                logits = model(x[:2])
            if number == extra and rank == 1:
                model(x[:2])
            try:
                model.pace.loss(logits, labels[:2])
            except pace_torch.PaceError as error:
                complaints.setdefault(extra, []).append((number, str(error)))
    # Whoever numbers the processes himself is left alone.
    model.pace.shard, model.pace.step = (rank, dist.get_world_size()), rank
    for _ in range(50):
        model.pace.loss(logits, labels[:2])
    # So is one model after another.
    for step in (10, 20):
        model = pace_torch.inject(vit(), rank=2).train()
        model.pace.step = step
        dist.barrier()
        model.pace.loss(logits, labels[:2])
    return complaints


def run(world_size, folder, *more):
    """What the processes saw."""
    mp.start_processes(worker, (world_size, free_port(), str(folder), *more), nprocs=world_size, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(world_size)]


@pytest.fixture(scope="module", autouse=True)
def server():
    with fork_server("test_distributed"):
        yield


@pytest.fixture(scope="module")
def alone():
    return {variant: train(variant, 0, 1) for variant in VARIANTS}


@pytest.fixture(scope="module", params=[2, 4])
def together(request, tmp_path_factory):
    """What each of so many processes has seen."""
    return run(request.param, tmp_path_factory.mktemp("processes"))


def test_processes_together_do_what_one_does(alone, together):
    for variant, expected in alone.items():
        parts = [results[variant] for results in together]
        for step in range(STEPS):
            assert torch.equal(torch.cat([part["noise"][step] for part in parts], dim=1), expected["noise"][step])
            assert torch.equal(torch.cat([part["scale"][step] for part in parts]), expected["scale"][step])
            close(torch.stack([part["losses"][step] for part in parts]).mean(0), expected["losses"][step], 1e-10)
        assert any((scale == 0).any() and (scale != 0).any() for scale in expected["scale"])
        for part in parts:
            for name, weight in expected["weights"].items():
                assert torch.equal(part["weights"][name], parts[0]["weights"][name]), name
                # AdamW divides by the size of a gradient: where that is rounding, so is the step.
                close(part["weights"][name], weight, 1e-10)
            if variant == "fast":
                assert torch.equal(part["history"], parts[0]["history"])
                close(part["history"], expected["history"], 1e-10)


def test_processes_that_fall_out_of_step_are_found_out(together):
    for extra in (1, 2, 50):
        found = [complaint for results in together for complaint in results["complaints"].get(extra, [])]
        # One process has run its model once more, and is found out by a neighbour or finds it out at the next look.
        assert {number for number, _ in found} == {number for number in (1, 2, 50) if number >= extra}
        for number, message in found:
            assert "process 1 is at step" in message or "process 1 at step" in message
            assert f"after {number} losses" in message


def test_other_engines_do_what_one_process_does(alone, tmp_path):
    together, expected = run(2, tmp_path, True), alone["pace"]
    for name in ENGINES:
        parts = [results[name] for results in together]
        for step in range(STEPS):
            assert torch.equal(torch.cat([part["noise"][step] for part in parts], dim=1), expected["noise"][step])
            close(torch.stack([part["losses"][step] for part in parts]).mean(0), expected["losses"][step], 1e-10)
        for part in parts:
            assert name == "FSDP1" or part["weights"].keys() - {"unused"} == expected["weights"].keys()
            for weight, tensor in expected["weights"].items():
                assert type(part["weights"][weight]) is torch.Tensor
                close(part["weights"][weight], tensor, 1e-10)


    if "Trainer" not in together[0]:
        pytest.skip("transformers, which comes with peft, is not installed: Trainer is not tested")
    expected = trainer(0, 1, tmp_path)
    for results in together:
        for name, tensor in expected.items():
            close(results["Trainer"][name], tensor, 1e-8)


def test_a_sharded_history_needs_no_exchange():
    # Each process numbers its own samples; what the others have is not here, so an exchange would hang or fail.
    model = pace_torch.inject(vit(), rank=2, variant="fast", samples=4).train()
    model.pace.shard = (1, 2)
    x, labels, _ = data(0)
    for _ in range(2):
        losses = model.pace.training_step(model, x[:4], labels[:4], torch.arange(4))
    assert model.pace.first_sample == 4 and losses.consistency > 0
    assert (model.pace.history.abs().sum(1) > 0).all()
