"""What other code writes to a prepared model, by ways that no counter shows: the next swap is right all the same.

Each is compared with a fresh load, in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle

import pytest
import torch
from lengths import long
from models import KINDS, call, lora_layers, save_family
from oracle import untouched
from peft import PeftModel
from refusals import refused
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from hotswap_lab import Adapter, AdapterPool, hotswap_adapter, plan_hotswap, prepare_model_for_compiled_hotswap

LINEAR = KINDS["linear"]
RANKS = (8, 2, 4)


def loaded(folder: str, **options: object) -> PeftModel:
    return PeftModel.from_pretrained(LINEAR.base().double(), folder, **options).eval()


@torch.no_grad()
def outputs(model: torch.nn.Module) -> torch.Tensor:
    return model(LINEAR.inputs().double())


def assert_has(model: torch.nn.Module, folder: str) -> None:
    torch.testing.assert_close(outputs(model), outputs(loaded(folder)), rtol=0, atol=1e-12)


@pytest.fixture
def family(tmp_path) -> list[str]:
    """Of the ranks 8, 2 and 4; the last has fewer layers."""
    few = dict(target_modules=["first", "last"])
    return save_family(LINEAR, tmp_path, *[dict(r=rank, **(few if rank == 4 else {})) for rank in RANKS])


def parameters_of(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [each for layer in lora_layers(model) for each in (layer.lora_A.default.weight, layer.lora_B.default.weight)]


#: the ways to swap; each makes a function that swaps to an adapter by its number, and the model
WAYS = {
    "disk": lambda model, family: lambda number: hotswap_adapter(model, family[number], "default"),
    "adapter": lambda model, family: lambda number: hotswap_adapter(model, Adapter.load(family[number]), "default"),
    "pool": lambda model, family: AdapterPool(model, adapters=dict(zip("012", family, strict=True)), progress=False),
}


def swapper(way: str, model: PeftModel, family: list[str]) -> Callable[[int], object]:
    prepare_model_for_compiled_hotswap(model, adapters=family)
    made = WAYS[way](model, family)
    return (lambda number: made.swap(str(number))) if way == "pool" else made


def add(parameter: torch.Tensor) -> None:
    parameter.data.add_(0.1)


def copy_to(parameter: torch.Tensor) -> None:
    parameter.data.copy_(torch.full_like(parameter, 0.3))


def write_last_component(parameter: torch.Tensor) -> None:
    with torch.inference_mode(parameter.is_inference()):
        parameter.data.movedim(parameter.shape.index(8), 0)[-1] = 0.5


def write_by_numpy(parameter: torch.Tensor) -> None:
    parameter.detach().numpy()[:] += 0.2


def multiply(parameter: torch.Tensor) -> None:
    parameter.data.mul_(1.5)


WRITES = [add, copy_to, write_last_component, write_by_numpy, multiply]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("is_trainable", [False, True])
def test_a_swap_after_a_write_that_no_counter_shows(family, way, write, is_trainable):
    swap = swapper(way, model := loaded(family[0], is_trainable=is_trainable), family)
    for number in (1, 2, 1, 0, 1):
        for parameter in parameters_of(model):
            write(parameter)
        swap(number)
        assert_has(model, family[number])


@pytest.mark.parametrize("way", WAYS)
def test_the_averages_of_diffusers(family, way):
    """``EMAModel`` writes by ``.data``: what it restores is of another rank than what was swapped in meanwhile."""
    training_utils = pytest.importorskip("diffusers.training_utils")
    swap = swapper(way, model := loaded(family[0]), family)
    for _ in range(2):  # and again after the same swaps
        swap(0)
        average = training_utils.EMAModel(parameters_of(model))
        average.store(parameters_of(model))
        swap(1)
        average.restore(parameters_of(model))
        swap(2)
        assert_has(model, family[2])
        average.copy_to(parameters_of(model))
        swap(1)
        assert_has(model, family[1])


@pytest.mark.parametrize("way", WAYS)
def test_inference_tensors_have_no_counter(family, way):
    with torch.inference_mode():
        model = loaded(family[0])
        swap = swapper(way, model, family)
    for number in (1, 2, 1):
        with torch.inference_mode():
            for parameter in parameters_of(model):
                parameter.add_(0.1)
        swap(number)
        assert_has(model, family[number])


def test_a_block_of_a_pool_and_what_was_there_before_it(family):
    """Weights that were written by ``.data`` are those that come back, not those that the pool knows.

    What was written only beyond the rank is not a weight of the adapter: zeros come back.
    """
    model = loaded(family[0])
    pool = AdapterPool(model, adapters=dict(zip("012", family, strict=True)), progress=False)
    names = cycle("120")
    for write in (*WRITES, lambda parameter: None):
        pool.swap("1")
        for parameter in parameters_of(model):
            write(parameter)
        written, name = outputs(model), next(names)
        with pool.using(name):
            assert_has(model, family[int(name)])
        if write is write_last_component:
            assert_has(model, family[1])
        else:
            torch.testing.assert_close(outputs(model), written, rtol=0, atol=1e-12)
    pool.swap("1")
    with torch.inference_mode(), pool.using("2"):
        assert_has(model, family[2])
    assert_has(model, family[1])


# ---- rows of a batch


def multiply_one_b(parameter: torch.Tensor) -> None:
    if parameter.shape == (6, 8):
        parameter.data.mul_(1.5)


def exchange_last_component(parameter: torch.Tensor) -> None:
    """Seen by a counter only."""
    with torch.no_grad():
        parameter.movedim(parameter.shape.index(8), 0)[-1] = 0.5


@pytest.fixture(params=["eager", "in inference mode", long("compiled")])
def pool_with_rows(request, family) -> tuple[AdapterPool, Callable]:
    with torch.inference_mode(request.param == "in inference mode"):
        model = loaded(family[0])
        adapters = dict(zip("012", family, strict=True))
        pool = AdapterPool(model, adapters=adapters, rows=3, progress=False)
    return pool, torch.compile(model, backend="eager") if request.param == "compiled" else model


ROW_WRITES = [add, copy_to, write_by_numpy, multiply, multiply_one_b, exchange_last_component]


@pytest.mark.parametrize("write", ROW_WRITES)
def test_rows_after_a_write_that_no_counter_shows(pool_with_rows, family, write, fresh_compiler):
    """Such a write reaches row 0 only. It is refused, and all is right after what the refusal says."""
    pool, compute = pool_with_rows
    inputs = LINEAR.inputs().double()[:3]
    by_model = [outputs(loaded(each))[:3] for each in family]

    def assert_rows(*wanted: int) -> None:
        expected = torch.stack([by_model[number][row] for row, number in enumerate(wanted)])
        with torch.no_grad():
            torch.testing.assert_close(compute(inputs), expected, rtol=0, atol=1e-12)

    if write is exchange_last_component and parameters_of(pool.model)[0].is_inference():
        pytest.skip("no counter, and not a write to a whole tensor: assigning again makes it right")
    for wanted, again in (((0, 1, 2), (0, 1, 2)), ((0, 0, 0), (0, 2, 2)), ((0, 1, 0), (2, 1, 0))):
        pool.assign([*map(str, wanted)])
        assert_rows(*wanted)
        for parameter in parameters_of(pool.model):
            write(parameter)
        refused("knows of one row only", compute, inputs)
        pool.assign([*map(str, again)])
        assert_rows(*again)
    for parameter in parameters_of(pool.model):
        write(parameter)
    pool.swap("1")
    assert_rows(1, 1, 1)
    if compute is not pool.model:  # whose code reads the rows, and not the parameters
        for parameter in parameters_of(pool.model):
            write(parameter)
        refused("knows of one row only", compute, inputs)


def test_rows_get_new_weights_whatever_part_of_row_0_was_written(pool_with_rows, family):
    pool, compute = pool_with_rows
    pool.assign(["0", "1"])
    for parameter in parameters_of(pool.model):
        write_last_component(parameter)
    pool.assign(["0", "2"])
    found = call(compute, LINEAR.inputs().double()[:2])
    for row, number in enumerate((0, 2)):
        torch.testing.assert_close(found[row], outputs(loaded(family[number]))[row], rtol=0, atol=1e-12)


def test_vectors_of_all_parameters(family):
    """PyTorch's own functions need contiguous parameters; a prepared model's are strided, as its docstring says."""
    model = loaded(family[0])
    pool = AdapterPool(model, adapters=dict(zip("012", family, strict=True)), progress=False)
    swap = swapper("disk", model, family)
    parameters = parameters_of(model)
    with pytest.raises(RuntimeError, match="reshape"):
        parameters_to_vector(parameters)
    vector = torch.cat([each.detach().reshape(-1) for each in parameters])
    pool.swap("1")
    for each, part in zip(parameters, vector.split([each.numel() for each in parameters]), strict=True):
        each.data.copy_(part.view_as(each))
    pool.swap("2")
    assert_has(model, family[2])
    vector_to_parameters(vector, parameters)
    refused("make a new AdapterPool", pool.swap, "1")
    for number in (1, 2):
        swap(number)
        assert_has(model, family[number])


# ---- a plan writes nothing


@pytest.mark.filterwarnings("ignore:The adapter 'default' has rank 2, but the padding", "ignore:The rows of default")
@pytest.mark.parametrize("way", ["plain", "prepared", "pool", "rows"])
def test_a_plan_and_its_change_write_nothing(family, way):
    """Neither to the model nor to what is noted of it, also after a write by other code."""
    model, adapters = loaded(family[0]), dict(zip("012", family, strict=True))
    if way == "prepared":
        prepare_model_for_compiled_hotswap(model, adapters=family)
    elif way != "plain":
        pool = AdapterPool(model, adapters=adapters, rows=2 if way == "rows" else 1, progress=False)
    for number in (1, 2):
        hotswap_adapter(model, family[1], "default")
        if way == "rows":
            pool.assign(["1", None])
        with torch.no_grad():
            parameters_of(model)[0].add_(0.1)
        if way in ("plain", "prepared"):
            with untouched(model):
                plan_hotswap(model, family[number], "default").change()
            continue
        with untouched(pool):
            plan_hotswap(model, family[number], "default").change()
            packed = pool._members[str(number)].packed
            pool._room.change_to_packed(packed, 0.5)
            pool._room.change_strength(0.5)
            if way == "rows":
                pool._room.change_rows([packed, packed], 1)
                pool._room.change_rows([None, packed], 1)
