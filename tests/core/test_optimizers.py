"""Optimizers and the memory of a prepared model: each step is that of a fresh load, or is refused before it writes."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence

import pytest
import torch
from lengths import few_of
from models import COPIES, KINDS, copied, load, save_family
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from transformers import Trainer, TrainingArguments

from hotswap_lab import AdapterPool, HotswapError, hotswap_adapter, prepare_model_for_compiled_hotswap, resolve_slot

LLAMA = KINDS["llama"]
OPTIMIZERS = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad)
CURE = r"foreach=True; in a Trainer, set optim=\"adamw_torch\""


def prepare(model, *_):
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    return model


def pool_of(model, folders, **how):
    AdapterPool(model, adapters={"new": folders[1]}, progress=False, **how)
    return model


def rows_of(model, folders):
    """Rows are not trained, and refuse a forward then; but somebody may try."""
    parameters = trained(model)
    pool_of(model.requires_grad_(False), folders, rows=2)
    for each in parameters:
        each.requires_grad_()
    return model


#: what is done to a loaded model. Copies have memory of their own; what is moved leaves the common memory
READY: dict[str, Callable] = {
    "prepared": prepare,
    "a pool": pool_of,
    "rows": rows_of,
    "moved": lambda model, _: prepare(model).double().float(),
    "unprepared": lambda model, _: model,
    "swapped": lambda model, folders: hotswap_adapter(model, folders[1], "default") or model,
    **{f"a copy by {way}": lambda model, _, way=way: copied(prepare(model), way) for way in COPIES},
}
SHARED = ("prepared", "a pool")


def trained(model) -> list[torch.nn.Parameter]:
    return [each for each in model.parameters() if each.requires_grad]


def train(parameters: Sequence[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Two steps, with gradients as autograd lays them out."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        optimizer.zero_grad()
        sum((each * torch.randn(each.shape, generator=generator)).sum() for each in parameters).backward()
        optimizer.step()


@pytest.mark.parametrize("ready", READY)
@pytest.mark.parametrize("kind", few_of(("linear", "conv", "embedding", "gpt2"), ("linear",)))
@pytest.mark.parametrize("which", OPTIMIZERS)
def test_a_fused_step_is_right_or_refused(tmp_path, kind, ready, which):
    """The fused kernels of the CPU ignore strides, so in common memory they would write to other layers."""
    if (kind, ready) == ("conv", "rows"):
        pytest.skip("refused")
    kind = KINDS[kind]
    folders = save_family(kind, tmp_path, dict(r=4), dict(r=8))
    loaded = load(kind, folders[0], is_trainable=True)
    early = which(trained(loaded), lr=0.1, fused=True)
    parameters = trained(READY[ready](loaded, folders))
    late = which(parameters, lr=0.1, fused=True)
    truth = [each.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for each in parameters]
    before = [each.detach().clone() for each in truth]
    train(truth, which(truth, lr=0.1, foreach=False))
    if ready in SHARED:
        for fused in (early, late):
            with pytest.raises(HotswapError, match=CURE) as error:
                train(parameters, fused)
            assert f"{which.__name__}(..., fused=True), and a parameter of shape" in str(error.value)
        assert all(map(torch.equal, parameters, before))
        train(parameters, which(parameters, lr=0.1, foreach=True))
    else:
        train(parameters, late)
    for own, expected, was in zip(parameters, truth, before, strict=True):
        torch.testing.assert_close(own, expected)
        assert (expected - was).abs().max() > 1e-2


@pytest.mark.parametrize("frozen", [0, -1, None])
def test_gradients_of_the_old_adapter_go_whatever_is_frozen(tmp_path, frozen):
    old, new = save_family(KINDS["linear"], tmp_path, dict(r=4), dict(r=4))
    parameters = trained(model := prepare(load(KINDS["linear"], old, is_trainable=True)))
    if frozen is not None:
        parameters.pop(frozen).requires_grad_(False)
    for each in parameters:
        each.grad = torch.ones_like(each)
    hotswap_adapter(model, new)
    assert [each.grad for each in parameters] == [None] * len(parameters)


def test_what_else_a_fused_kernel_takes_for_one_piece(tmp_path):
    """The gradient, and the state, which a file may have with the strides of another model; nothing that is frozen."""
    [folder] = save_family(KINDS["linear"], tmp_path, dict(r=4))
    frozen = trained(prepare(load(KINDS["linear"], folder, is_trainable=True)))
    # of rank 1, strides say nothing; and one that has no gradient
    others = [torch.nn.Parameter(torch.zeros(4, 3).T[:, :1]), torch.nn.Parameter(torch.zeros(2))]
    rows, columns = torch.ones(3, 4), torch.ones(4, 3).T
    for own, layout in ((columns, rows), (rows, columns), (rows, rows)):
        parameter = torch.nn.Parameter(torch.zeros_like(own))
        optimizer = torch.optim.AdamW([parameter, *others, *frozen], fused=True)
        for each in frozen:
            each.requires_grad_(False)
        parameter.grad, others[0].grad = torch.ones_like(own), torch.ones(3, 1)
        optimizer.step()
        optimizer.state[parameter]["exp_avg"] = layout
        with (
            contextlib.nullcontext()
            if own is layout
            else pytest.raises(HotswapError, match="exp_avg of a parameter with")
        ):
            optimizer.step()
    parameter.grad = columns
    with pytest.raises(HotswapError, match="gradient of a parameter with strides"):
        optimizer.step()


def losses(model, folder, **arguments) -> list[float]:
    """Six steps of a Trainer."""
    ids = LLAMA.inputs()["input_ids"][:1]
    settings = dict(max_steps=6, learning_rate=0.05, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    settings |= dict(save_strategy="no", dataloader_pin_memory=False, logging_strategy="steps")
    data = [dict(input_ids=ids[0], labels=ids[0])] * 8
    trainer = Trainer(model, TrainingArguments(str(folder), **settings, **arguments), train_dataset=data)
    trainer.train()
    return [each["loss"] for each in trainer.state.log_history if "loss" in each]


def test_a_trainer_by_default_is_stopped_and_with_the_cure_it_is_right(tmp_path):
    [folder] = save_family(LLAMA, tmp_path, dict(r=4, lora_alpha=8))
    fresh = losses(load(LLAMA, folder, is_trainable=True), tmp_path)
    model = prepare(load(LLAMA, folder, is_trainable=True))
    before = [each.detach().clone() for each in trained(model)]
    with pytest.raises(HotswapError, match=CURE):
        losses(model, tmp_path)
    assert all(map(torch.equal, before, trained(model)))
    with_cure = losses(prepare(load(LLAMA, folder, is_trainable=True)), tmp_path, optim="adamw_torch")
    assert with_cure == pytest.approx(fresh, abs=1e-4)
    assert fresh[0] - fresh[-1] > 0.05


@pytest.mark.long
def test_a_fused_step_that_is_compiled(tmp_path, fresh_compiler):
    [folder] = save_family(LLAMA, tmp_path, dict(r=4))
    parameters = trained(prepare(load(LLAMA, folder, is_trainable=True)))
    optimizer = torch.optim.AdamW(parameters, fused=True)
    before = [each.detach().clone() for each in parameters]
    for each in parameters:
        each.grad = torch.ones(each.shape, dtype=each.dtype)
    with pytest.raises(Exception, match="foreach=True"):
        torch.compile(optimizer.step, backend="eager")()
    assert all(map(torch.equal, before, parameters))


def step_elsewhere(model, queue) -> None:
    parameters = trained(model)
    for each in parameters:
        each.grad = torch.ones(each.shape, dtype=each.dtype)
    try:
        torch.optim.SGD(parameters, lr=0.1, fused=True).step()
    except HotswapError as error:
        queue.put(str(error))
    else:
        queue.put("a step")


@pytest.mark.long
def test_a_fused_step_in_another_process_that_shares_the_memory(tmp_path):
    [folder] = save_family(KINDS["linear"], tmp_path, dict(r=4))
    model = prepare(load(KINDS["linear"], folder, is_trainable=True)).share_memory()
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=step_elsewhere, args=(model, queue), daemon=True)
    process.start()
    assert re.search(CURE, queue.get(timeout=120))
    process.join(60)


#: PEFT's own optimizers by name: how they are made for a model with an adapter of this alpha
OWN = {
    "LoRA-FA": lambda model, alpha: create_lorafa_optimizer(model=model, r=4, lora_alpha=alpha, lr=0.05),
    "LoRA+": lambda model, _: create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=8, eps=1e-3, foreach=True
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("ready", ["unprepared", "prepared"])
@pytest.mark.parametrize("name", OWN)
def test_pefts_own_optimizers_after_a_swap(tmp_path, name, ready):
    """LoRA-FA reads the scalings when it is made, so to clear its state isn't enough after a swap to other ones."""
    folders = save_family(LLAMA, tmp_path, dict(r=4, lora_alpha=4), dict(r=4, lora_alpha=32))
    ids = LLAMA.inputs()["input_ids"]

    def stepped(model, optimizer) -> list[torch.Tensor]:
        for _ in range(3):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        return [each.own(each.parameter.detach().clone(), 4) for each in resolve_slot(model, "default").tensors]

    fresh = load(LLAMA, folders[1], is_trainable=True)
    expected, found = stepped(fresh, OWN[name](fresh, 32)), {}
    for way in ("cleared", "new"):
        model = READY[ready](load(LLAMA, folders[0], is_trainable=True), folders)
        optimizer = OWN[name](model, 4)
        stepped(model, optimizer)
        hotswap_adapter(model, folders[1], "default")
        optimizer.state.clear()
        own = stepped(model, OWN[name](model, 32) if way == "new" else optimizer)
        found[way] = max((one - other).abs().max().item() for one, other in zip(own, expected, strict=True))
    assert found["new"] < 1e-3, found
    # the scalings of a prepared model are tensors, which follow
    assert (found["cleared"] > 1e-2) == ((name, ready) == ("LoRA-FA", "unprepared")), found
