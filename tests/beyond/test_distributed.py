"""Swaps in models that are spread over processes: FSDP2, tensor parallelism, DTensors placed by hand.

All cases run in the same two processes, which are started once; each of them must pass in both.
"""

from __future__ import annotations

import datetime
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from models import KINDS, Kind, call, llama, load, save_random_adapter, with_exact_norms
from oracle import assert_close, assert_same_outputs, assert_same_tables, assert_same_tensors, config_of, tables_of
from peft import PeftModel
from safetensors.torch import load_file

from hotswap_lab import (
    Adapter,
    AdapterPool,
    HotswapError,
    hotswap_adapter,
    plan_hotswap,
    prepare_model_for_compiled_hotswap,
    resolve_slot,
    save_adapter,
)
from hotswap_lab.core import change

if not dist.is_available():
    pytest.skip("a PyTorch without distributed", allow_module_level=True)

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

try:
    from transformers.distributed.configuration_utils import DistributedConfig
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism  # noqa: F401
except ImportError:  # before DTensors, PEFT's weights have local shapes there, which fit no file: refused
    DistributedConfig = None

PROCESSES = 2
#: after this long, a process that waits for another one gets an error instead
PATIENCE = datetime.timedelta(seconds=30)


LLAMA = Kind(partial(llama, num_key_value_heads=2), KINDS["llama"].make_inputs, KINDS["llama"].modules)
ALL = list(LLAMA.modules)
#: by the rank: the same, uneven over two processes, higher, so low that one of two processes has nothing, fewer layers
FAMILY = {
    "first": dict(r=4, lora_alpha=16, target_modules=ALL),
    "same": dict(r=4, lora_alpha=12, target_modules=ALL),
    "odd": dict(r=3, lora_alpha=9, target_modules=ALL),
    "odd too": dict(r=3, lora_alpha=12, target_modules=ALL),
    "grown": dict(r=8, lora_alpha=24, use_rslora=True, target_modules=ALL),
    "one": dict(r=1, lora_alpha=4, target_modules=ALL),
    "one too": dict(r=1, lora_alpha=3, target_modules=ALL),
    "dora": dict(r=4, use_dora=True, target_modules=ALL),
    "dora on fewer": dict(r=4, use_dora=True, target_modules=["q_proj", "o_proj"]),
    "biased": dict(r=4, lora_bias=True, target_modules=ALL),
    "biased too": dict(r=4, lora_alpha=3, lora_bias=True, target_modules=ALL),
    "fewer": dict(r=4, lora_alpha=24, target_modules=["q_proj", "o_proj", "up_proj"]),
}
ANY_RANK = ("same", "grown", "odd", "one", "fewer", "first")


class World:
    """What a case gets: this process's place among all, and the adapters, which every process can read."""

    def __init__(self, rank: int, folder: Path):
        self.rank, self.folder = rank, folder
        self.mesh: DeviceMesh = init_device_mesh("cpu", (PROCESSES,))

    def adapter(self, name: str) -> str:
        return str(self.folder / name)

    def load(self, name: str = "first", kind: Kind = LLAMA) -> PeftModel:
        return load(kind, self.adapter(name))

    def everywhere(self, answer: object) -> list:
        """The answers of all processes."""
        answers = [None] * PROCESSES
        dist.all_gather_object(answers, answer)
        return answers


#: by name: a function that gets the world, and what else it gets
CASES: dict[str, tuple] = {}


def case(function: Callable[[World], None]) -> Callable[[World], None]:
    CASES[function.__name__.replace("_", " ")] = (function,)
    return function


# ---- the processes


def run_cases(rank: int, folder: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(PROCESSES))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    meeting_point = f"file://{folder}/meeting_point"
    dist.init_process_group("gloo", init_method=meeting_point, rank=rank, world_size=PROCESSES, timeout=PATIENCE)
    world = World(rank, Path(folder))
    for number, name in enumerate(names):
        try:
            function, *arguments = CASES[name]
            function(world, *arguments)
            verdict = ""
        except BaseException:
            verdict = traceback.format_exc()
        Path(folder, f"verdict-{number}-{rank}").write_text(verdict or "passed")
    dist.barrier()
    # without taking down process groups that dead models may still hold on to
    sys.stdout.flush()
    os._exit(0)


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory, request) -> dict[str, list[str]]:
    items = [item for item in request.session.items if item.path == request.path]
    names = [item.callspec.params["name"] for item in items]
    folder = tmp_path_factory.mktemp("distributed")
    for number, (name, settings) in enumerate(FAMILY.items()):
        save_random_adapter(LLAMA, folder / name, seed=number, **settings)
    LLAMA.base().save_pretrained(folder / "base")
    for name in ("conv", "embedding"):
        for rank in (4, 8):
            save_random_adapter(KINDS[name], folder / f"{name} {rank}", seed=rank, r=rank, lora_alpha=3)
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=run_cases, args=(rank, str(folder), names)) for rank in range(PROCESSES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=180)
    for process in processes:
        if process.is_alive():
            process.kill()
    return {
        name: [_read(folder / f"verdict-{number}-{rank}") for rank in range(PROCESSES)]
        for number, name in enumerate(names)
    }


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else "this process ended, or was ended, before it came here"


# ---- what a case compares


def whole_of(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.detach().to_local() if isinstance(parameter, DTensor) else parameter.detach()


def sharded(model) -> list[DTensor]:
    parameters = [tensor.parameter for tensor in resolve_slot(model, "default").tensors]
    return [parameter for parameter in parameters if isinstance(parameter, DTensor)]


def swap(model, folder: str) -> None:
    """A swap during which no process sends anything to another one."""
    with CommDebugMode() as communication:
        hotswap_adapter(model, folder, "default")
    assert communication.get_total_counts() == 0


def assert_holds(world: World, model, name: str, *, padded: bool = False) -> None:
    """The weights are those of the adapter's file, put together from all processes and in each of them."""
    file = load_file(f"{world.adapter(name)}/adapter_model.safetensors")
    for layer in resolve_slot(model, "default").layers:
        for tensor in layer.tensors:
            expected = file.get(f"base_model.model.{layer.path}.{tensor.key}")
            if expected is None:
                expected = torch.zeros(tensor.parameter.shape)
            if padded:
                expected = tensor.padded(expected, tensor.capacity)
            parameter = tensor.parameter
            assert torch.equal(whole_of(parameter.detach()), expected), (name, layer.path, tensor.key)
            if isinstance(parameter, DTensor):  # by plain chunks, not by what DTensor says
                (placement,) = parameter.placements
                if isinstance(placement, Shard):
                    parts = expected.chunk(PROCESSES, placement.dim)
                    nothing = expected.narrow(placement.dim, 0, 0)
                    expected = parts[world.rank] if world.rank < len(parts) else nothing
            assert torch.equal(local(parameter), expected)


def assert_equals_fresh_load(world: World, model, name: str, *, padded: bool = False) -> None:
    assert_holds(world, model, name, padded=padded)
    fresh = world.load(name)
    assert_same_outputs(model, fresh, LLAMA)
    assert_same_tables(model, fresh, "default", prepared=True)
    assert config_of(model.peft_config["default"]) == config_of(fresh.peft_config["default"])


def state(model) -> list:
    """Everything of an adapter that a refused swap must leave alone, as far as this process holds it."""
    found = []
    for tensor in resolve_slot(model, "default").tensors:
        parameter, part = tensor.parameter, local(tensor.parameter)
        # of a copy: memory that NumPy has seen can't be given back, and FSDP wants to
        value = part.data_ptr(), part.clone().numpy().tobytes(), parameter.grad
        found.append((id(parameter), parameter.shape, value, getattr(tensor.owner, tensor.size_attribute or "", None)))
    tables = [
        (path, [(table, entry) for table, entry in tables_of(module, "default", prepared=True)])
        for path, module in model.named_modules()
        if hasattr(module, "adapter_layer_names")
    ]
    config = model.peft_config["default"]
    return [found, tables, id(config), config.to_dict()]


@contextmanager
def refusal(world: World, model, match: str):
    """A refusal, in the same words in all processes, that leaves everything as it was."""
    before = state(model)
    with pytest.raises(HotswapError, match=match) as error:
        yield
    assert state(model) == before
    first, *others = world.everywhere(str(error.value))
    # but for the part that it has itself
    assert match == "sharded unevenly" or all(other == first for other in others)


# ---- ways to spread a model


def fsdp_layers(world: World, model) -> PeftModel:
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=world.mesh)
    return model


def shard_fully(world: World, model) -> PeftModel:
    return fully_shard(fsdp_layers(world, model), mesh=world.mesh)


def fsdp_base_layers(world: World, model) -> PeftModel:
    for layer in resolve_slot(model, "default").layers:
        fully_shard(layer.module.base_layer, mesh=world.mesh)
    assert not sharded(model)
    return model


def parallel(world: World, model) -> PeftModel:
    """A along its rank and B along its outputs, or both along what is summed over."""
    styles = {}
    for layer in resolve_slot(model, "default").layers:
        rowwise = layer.path.endswith(("o_proj", "down_proj"))
        for part in "AB":
            styles[f"base_model.model.{layer.path}.lora_{part}.default"] = (
                RowwiseParallel(input_layouts=Replicate()) if rowwise else ColwiseParallel(output_layouts=Replicate())
            )
    model = parallelize_module(model, world.mesh, styles)
    assert len(sharded(model)) == len(resolve_slot(model, "default").tensors)
    return model


def parallel_by_transformers(world: World, model) -> PeftModel:
    config = DistributedConfig(tp_size=PROCESSES)
    base = AutoModelForCausalLM.from_pretrained(world.folder / "base", distributed_config=config)
    model = PeftModel.from_pretrained(with_exact_norms(base), world.adapter("first")).eval()
    assert {parameter.placements for parameter in sharded(model)} == {(Shard(0),), (Shard(1),)}
    return model


def prepared(world: World, model) -> PeftModel:
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    return parallel(world, model)


def place(model, spread: Callable[[torch.Tensor], DTensor]) -> PeftModel:
    for tensor in resolve_slot(model, "default").tensors:
        part = torch.nn.Parameter(spread(tensor.parameter.detach()), requires_grad=False)
        tensor.owner._parameters[tensor.name] = part
    return model


def placed(placement: Placement) -> Callable:
    return lambda world, model: place(model, lambda whole: distribute_tensor(whole, world.mesh, [placement]))


def partial_sums(world: World, model) -> PeftModel:
    return place(model, lambda whole: DTensor.from_local(whole / PROCESSES, world.mesh, [Partial()]))


def placed_within_fsdp(world: World, model) -> PeftModel:
    """Shards of shards: which part a process holds is known only to private parts of PyTorch."""
    mesh = init_device_mesh("cpu", (1, PROCESSES), mesh_dim_names=("data", "tensor"))
    place(model, lambda whole: distribute_tensor(whole, mesh["tensor"], [Shard(0)]))
    for layer in resolve_slot(model, "default").layers:
        fully_shard(layer.module.lora_A["default"], mesh=mesh["data"])
    return model


def placed_unevenly(world: World, model) -> PeftModel:
    """``from_local`` takes any sizes that add up: here, 1 and 3 rows of 4."""

    def spread(whole: torch.Tensor) -> DTensor:
        part = whole[:1] if world.rank == 0 else whole[1:]
        sizes = dict(shape=whole.shape, stride=whole.stride())
        return DTensor.from_local(part.contiguous(), world.mesh, [Shard(0)], run_check=False, **sizes)

    return place(model, spread)


# ---- swaps, and what is refused

#: how the model is spread, the adapter that was loaded, and those that are swapped in
SWAPS: dict[str, tuple[Callable, str, tuple[str, ...]]] = {
    "FSDP of the layers and of the rest": (shard_fully, "first", ("same", "fewer", "first")),
    "FSDP of the layers alone": (fsdp_layers, "first", ("same", "first")),
    "FSDP of a rank that can't be shared evenly": (shard_fully, "odd", ("odd too",)),
    "FSDP of a rank of which a process has nothing": (shard_fully, "one", ("one too",)),
    "FSDP of weights and biases": (shard_fully, "biased", ("biased too",)),
    "FSDP of DoRA, which is turned off": (shard_fully, "dora", ("dora on fewer", "dora")),
    "FSDP of the base layers alone": (fsdp_base_layers, "first", ANY_RANK),
    "tensor parallelism of PyTorch": (parallel, "first", (*ANY_RANK, "grown", "first")),
    "tensor parallelism of transformers": (parallel_by_transformers, "first", ANY_RANK),
    # any rank that there is room for, without another shape: what FSDP would need, too
    "prepared and then spread": (prepared, "first", ANY_RANK),
    **{f"placed by hand: {each}": (placed(each), "first", ANY_RANK) for each in (Replicate(), Shard(0), Shard(1))},
    **{
        f"{name}: {each}": (placed(each), f"{name} 4", (f"{name} 8", f"{name} 4"))
        for name in ("conv", "embedding")
        for each in (Shard(0), Shard(1))
    },
}


def _swaps(world: World, spread: Callable, loaded: str, names: tuple[str, ...]) -> None:
    kind = KINDS.get(loaded.split()[0], LLAMA)
    model = spread(world, world.load(loaded, kind))
    parameters = sharded(model)
    assert parameters or spread is fsdp_base_layers
    if loaded in ("odd", "one"):
        assert len(local(parameters[0])) == {"odd": (2, 1), "one": (1, 0)}[loaded][world.rank]
    addresses = [local(parameter).data_ptr() for parameter in parameters]
    for name in names:
        swap(model, world.adapter(name))
        if spread.__name__ == "<lambda>":  # what is placed by hand can't be computed with
            assert_holds(world, model, name)
        else:
            assert_equals_fresh_load(world, model, name, padded=spread is prepared)
            reshard(model)
            assert_saves(world, model, name)
    assert all(before is after for before, after in zip(parameters, sharded(model), strict=True))
    if spread is prepared:
        assert [local(parameter).data_ptr() for parameter in parameters] == addresses


#: how the model is spread, the loaded adapter, the new one, and why it is refused
REFUSED: dict[str, tuple[Callable, str, str, str]] = {
    "FSDP: a higher rank": (shard_fully, "first", "grown", "can't be changed while FSDP shards it"),
    "FSDP: a lower rank": (shard_fully, "first", "odd", "can't be changed while FSDP shards it"),
    "FSDP: another kind of LoRA": (shard_fully, "first", "dora", "spread over processes"),
    "in parallel: another kind of LoRA": (parallel, "first", "dora", "spread over processes"),
    "partial sums": (partial_sums, "first", "same", "spread over processes as"),
    "tensor parallelism within FSDP": (placed_within_fsdp, "first", "same", "spread over processes as"),
    "shards of other sizes": (placed_unevenly, "first", "same", "sharded unevenly"),
}


def _is_refused(world: World, spread: Callable, loaded: str, new: str, match: str) -> None:
    model = spread(world, world.load(loaded))
    with refusal(world, model, match):
        hotswap_adapter(model, world.adapter(new), "default")


def _training_goes_on(world: World, spread: Callable, new: str) -> None:
    """Gradients have the new shape, though an output of the old adapter is still alive."""
    model = spread(world, load(LLAMA, world.adapter("first"), is_trainable=True))
    ids = LLAMA.inputs()["input_ids"]
    still_alive = model(input_ids=ids, labels=ids).loss
    model(input_ids=ids, labels=ids).loss.backward()
    reshard(model)
    swap(model, world.adapter(new))
    assert all(parameter.grad is None for parameter in sharded(model))
    model(input_ids=ids, labels=ids).loss.backward()
    reshard(model)
    alone = load(LLAMA, world.adapter(new), is_trainable=True)
    alone(input_ids=ids, labels=ids).loss.backward()
    expected = [tensor.parameter.grad for tensor in resolve_slot(alone, "default").tensors]
    for parameter, gradient in zip(sharded(model), expected, strict=True):
        assert_close(parameter.grad.full_tensor(), gradient, 1e-8)
    del still_alive
    own, expected = sharded(model), [tensor.parameter for tensor in resolve_slot(alone, "default").tensors]
    for parameters in (own, expected):  # fused, which looks at each process's part alone
        torch.optim.AdamW(parameters, lr=0.1, eps=1.0, fused=True).step()
    for parameter, after in zip(own, expected, strict=True):
        assert_close(parameter.full_tensor(), after.detach(), 1e-8)


def _steps_in_parallel(world: World, is_prepared: bool) -> None:
    """DDP: all processes swap, and then take steps with the mean of their gradients."""
    model = load(LLAMA, world.adapter("first"), is_trainable=True)
    if is_prepared:
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    parallel = DistributedDataParallel(model)
    alone = load(LLAMA, world.adapter("same"), is_trainable=True)
    swap(model, world.adapter("same"))
    ids = LLAMA.inputs()["input_ids"]
    for each, own in ((parallel, ids[world.rank : world.rank + 1]), (alone, ids)):
        optimizer = torch.optim.SGD([one for one in each.parameters() if one.requires_grad], lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            each(input_ids=own, labels=own).loss.backward()
            optimizer.step()
    before = load(LLAMA, world.adapter("same"))
    slots = (resolve_slot(each, "default").tensors for each in (model, alone, before))
    for tensor, expected, was in zip(*slots, strict=True):
        parameter = tensor.own(tensor.parameter, expected.rank_of(expected.parameter.shape))
        assert_close(parameter, expected.parameter, 1e-8)
        assert not torch.equal(expected.parameter, was.parameter)


if DistributedConfig is None:
    del SWAPS["tensor parallelism of transformers"]
CASES |= {name: (_swaps, *arguments) for name, arguments in SWAPS.items()}
CASES |= {f"refused: {name}": (_is_refused, *arguments) for name, arguments in REFUSED.items()}
CASES |= {f"steps with DDP, prepared: {each}": (_steps_in_parallel, each) for each in (False, True)}
CASES["training with FSDP"] = _training_goes_on, shard_fully, "same"
CASES["training in parallel, with another rank"] = _training_goes_on, parallel, "grown"


# ---- FSDP


def reshard(model) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@case
def fsdp_weights_that_are_gathered_are_not_written(world):
    """The root's weights stay gathered after a forward. What is written to them would be gone at the next reshard."""
    model = fully_shard(world.load(), mesh=world.mesh)
    swap(model, world.adapter("same"))
    assert_equals_fresh_load(world, model, "same")
    assert not sharded(model)
    assert not plan_hotswap(model, world.adapter("first"), "default").ok
    with refusal(world, model, r"gathered by FSDP .* call reshard\(\)"):
        hotswap_adapter(model, world.adapter("first"), "default")
    with refusal(world, model, "gathered by FSDP|spread over processes"):
        hotswap_adapter(model, world.adapter("dora"), "default")
    # below the module that was sharded, nothing tells but the parameters
    with refusal(world, model, r"gathered by FSDP .* call reshard\(\)"):
        hotswap_adapter(model.base_model.model, world.adapter("first"), "default")
    reshard(model)
    swap(model, world.adapter("first"))
    assert_equals_fresh_load(world, model, "first")


@case
def fsdp_layers_are_added_whole(world):
    model = shard_fully(world, world.load("fewer"))
    before = sharded(model)
    hotswap_adapter(model, world.adapter("same"), "default", add_layers=True)
    assert sharded(model) == before
    assert_equals_fresh_load(world, model, "same")


def assert_saves(world: World, model, name: str) -> None:
    """The whole adapter, from each process."""
    saved = world.folder / f"saved by {world.rank}"
    save_adapter(model, saved)
    assert_same_tensors(*(load_file(f"{each}/adapter_model.safetensors") for each in (saved, world.adapter(name))))


@case
def one_process_can_ask_for_a_state_dict(world):
    """It would wait forever for the others if that took communication."""
    swap(dora := world.load("dora"), world.adapter("dora on fewer"))
    for spread in (shard_fully, parallel, None):
        model = spread(world, world.load()) if spread else shard_fully(world, dora)
        swap(model, world.adapter("fewer")) if spread else None
        if world.rank == 0:
            with CommDebugMode() as communication:
                keys = model.state_dict().keys()
            assert communication.get_total_counts() == 0
            assert sum("lora_" in key for key in keys) == 12


@case
def fsdp_1_is_refused(world):
    for keep in (True, False):
        model = world.load()
        wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=keep)
        outputs = call(wrapped, LLAMA.inputs())
        for name in ("same", "grown"):
            with pytest.raises(HotswapError, match="FSDP1"):
                hotswap_adapter(wrapped, world.adapter(name), "default")
        assert torch.equal(call(wrapped, LLAMA.inputs()), outputs)


@case
def what_is_spread_is_not_prepared(world):
    for spread in (parallel, shard_fully):
        model = spread(world, world.load())
        with refusal(world, model, "spread over processes can't be prepared"):
            prepare_model_for_compiled_hotswap(model, target_rank=8)
        with refusal(world, model, "spread over processes can't be prepared"):
            AdapterPool(model, adapters={"same": world.adapter("same")})
        assert_equals_fresh_load(world, model, "first")


@case
def the_caller_keeps_its_tensors(world):
    """A replicated weight is whole in each process, so it could have been taken over."""
    model = placed(Replicate())(world, world.load())
    adapter = Adapter.load(world.adapter("grown"))
    before = {key: value.clone() for key, value in adapter.tensors.items()}
    hotswap_adapter(model, adapter, "default")
    for parameter in sharded(model):
        with torch.no_grad():
            local(parameter).add_(1)
    assert all(torch.equal(value, before[key]) for key, value in adapter.tensors.items())


# ---- all or nothing, and in all processes alike


@case
def an_error_while_writing_is_taken_back(world):
    """New shapes, gradients, tables: all of it is written when the last step fails."""

    def fail(*_, **__):
        raise OSError("the last step failed")

    for name in ("same", "fewer", "grown"):
        model = parallel(world, world.load())
        for parameter in sharded(model):
            parameter.grad = torch.ones_like(parameter)
        before, parts = state(model), [parameter._local_tensor for parameter in sharded(model)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(change, "copy_all", fail)
            with pytest.raises(OSError, match="the last step failed"):
                hotswap_adapter(model, world.adapter(name), "default")
        assert state(model) == before
        assert all(parameter._local_tensor is part for parameter, part in zip(sharded(model), parts, strict=True))
        assert_equals_fresh_load(world, model, "first")
        swap(model, world.adapter(name))
        assert_equals_fresh_load(world, model, name)


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_in_two_processes(verdicts, name):
    for rank, verdict in enumerate(verdicts[name]):
        assert verdict == "passed", f"process {rank}: {verdict}"
