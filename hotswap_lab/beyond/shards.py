"""Swaps in parameters that are spread over several processes by tensor parallelism and FSDP2 (DTensors).

A swap needs no communication. Each process reads the whole file, and writes its own shard of each tensor. All processes
must make the same swap. They refuse the same swaps, because refusals depend only on state that all of them share
(config, shapes, placements). Other errors, such as in reading a corrupt file, may happen in one process alone. So the
caller has to make the processes agree before anything is written::

    try:
        plan = plan_hotswap(model, folder)
        ok = plan.ok
    except HotswapError:
        ok = False
    answers = [None] * dist.get_world_size()
    dist.all_gather_object(answers, ok)
    if all(answers):
        commit(plan)

Tests: ``tests/beyond/test_distributed.py``.
"""

import functools
from typing import TYPE_CHECKING, ClassVar

import torch

from ..core.change import Change, clear_gradients
from ..core.journal import Journal
from ..core.plan import Action, Plan
from ..core.planner import only_for
from ..core.tensors import SlotTensor

if TYPE_CHECKING or torch.distributed.is_available():
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
else:  # in a build of PyTorch without distributed, nothing can be sharded
    DTensor = None


def is_sharded(tensor: torch.Tensor) -> bool:
    return DTensor is not None and isinstance(tensor, DTensor)


def local_part(parameter: torch.Tensor) -> torch.Tensor:
    """The memory that this process has of a parameter, all or a shard. Writing to it changes the parameter."""
    if not is_sharded(parameter):
        return parameter
    # with gradients enabled, to_local() returns a new tensor with its own history
    with torch.no_grad():
        return parameter.to_local()


def shard(whole: torch.Tensor, like: DTensor) -> DTensor:
    """Spread ``whole`` over the processes as ``like`` is, without communication. Their shapes may differ.

    The result has the dtype and device of ``like``, and never shares memory with ``whole``.
    """
    return _spread(whole.detach().to(local_part(like).device, like.dtype, copy=True).contiguous(), like)


def _spread(whole: torch.Tensor, like: DTensor) -> DTensor:
    # by default the first process sends the shards, so the others would wait forever if it had refused the swap
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


class ShardedTensor(SlotTensor):
    """A tensor that is spread over processes. Each process writes its own shard."""

    is_shard: ClassVar[bool] = True

    @staticmethod
    def holds(owner: torch.nn.Module, name: str) -> bool:
        """Whether a parameter is spread over processes, even if it is gathered at the moment."""
        parameter = owner._parameters.get(name)
        if is_sharded(parameter) or getattr(parameter, "_fsdp_flattened", False):
            return True
        # FSDP registers a hook on each module that owns one of its parameters
        return bool(owner._load_state_dict_post_hooks) and _fsdp_keeper(owner, name) is not None

    @property
    def memory(self) -> torch.Tensor:
        return local_part(self.parameter)

    def obstacle(self) -> str | None:
        """Why writing to the parameter would not be enough, or None."""
        parameter, keeper = self.parameter, _fsdp_keeper(self.owner, self.name)
        if getattr(parameter, "_fsdp_flattened", False):
            return "flattened by FullyShardedDataParallel (FSDP1): use fully_shard (FSDP2) instead"
        if keeper is not None and parameter is not keeper.sharded_param:
            # the next reshard discards writes to gathered weights and restores the old adapter
            return "gathered by FSDP for a forward: call reshard() on each FSDPModule of the model, then swap"
        if not {type(placement) for placement in parameter.placements} <= {Shard, Replicate}:
            return f"spread over processes as {', '.join(map(str, parameter.placements))}"
        if type(local := self.memory) is not torch.Tensor:
            return f"sharded as {type(local).__name__}"
        if local_part(_spread(torch.empty(parameter.shape, device="meta"), parameter)).shape != local.shape:
            return f"sharded unevenly: this process holds {tuple(local.shape)} of {tuple(parameter.shape)}"
        return None

    def write(self, source: torch.Tensor | None, change: Change, fixed_size: bool) -> None:
        parameter = self.parameter
        # A write to the local shard doesn't change the DTensor's version. Without this, autograd would compute the
        # gradient of an earlier output with the new weights, and raise no error.
        if not parameter.is_inference():
            change.steps.append(lambda journal: torch.autograd.graph.increment_version(parameter))
        if source is None:
            change.zero(self.memory)
        elif fixed_size or source.shape == parameter.shape:
            padded = self.rank_of(source.shape) != self.capacity
            whole = self.padded(source, self.capacity) if padded else source
            change.copy(self.memory, local_part(shard(whole, parameter)))
        else:
            fresh = shard(source, parameter)
            change.steps.append(lambda journal: give_shard(parameter, fresh, journal))
            if self.size_attribute:
                change.sizes.append((self.owner, self.size_attribute, self.rank_of(source.shape)))


@functools.cache
def _sharded(kind: type[SlotTensor]) -> type[SlotTensor]:
    """The class of tensors of this kind that are spread over processes."""
    return type(ShardedTensor.__name__, (ShardedTensor, kind), {})


def is_distributed() -> bool:
    """Whether this process is one of several."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def spread(tensors: list[SlotTensor]) -> list[SlotTensor]:
    """The same tensors, with those that are spread over processes as :class:`ShardedTensor`."""
    if not is_distributed():
        return tensors
    return [
        _sharded(type(tensor))(**vars(tensor)) if ShardedTensor.holds(tensor.owner, tensor.name) else tensor
        for tensor in tensors
    ]


def holds_shards(model: torch.nn.Module) -> bool:
    """Whether any parameter of ``model`` is spread over processes, even if it is gathered at the moment."""
    return any(ShardedTensor.holds(module, name) for module in model.modules() for name in module._parameters)


def check_parallel_training(plan: Plan, layers: int, found: str) -> None:
    """Refuse to change the trained parameters of a model in DDP, which averages gradients of the old ones."""
    if not is_distributed() or not any(parameter.requires_grad for parameter in plan.slot.parameters):
        return
    modules = plan.slot.host.root.modules()
    if any(isinstance(module, torch.nn.parallel.DistributedDataParallel) for module in modules):
        plan.refuse("trained_in_parallel", layers=layers, found=found)


@only_for(lambda slot, is_distributed: is_distributed)
def check_shards(plan: Plan) -> None:
    """Refuse changes that processes sharing the parameters can't make independently.

    These are new shapes where FSDP has recorded the old ones, and magnitudes and biases that are frozen with their
    layer.
    """
    resized = [layer for layer in plan.layers if layer.action is Action.RESIZE]
    if changed := resized + [layer for layer in plan.layers if layer.action is Action.ADD]:
        check_parallel_training(plan, len(changed), f"another shape at {changed[0].path}")
    toggled = [layer for layer in plan.layers if (layer.settings is None) != (layer.rank_before is None)]
    if more := [layer for layer in toggled if any(tensor.rank_axis is None for tensor in layer.layer.tensors)]:
        check_parallel_training(plan, len(more), f"a magnitude or bias to freeze or unfreeze at {more[0].path}")
    # FSDP has recorded the shapes
    if fixed := [
        layer for layer in resized if any(_fsdp_keeper(part.owner, part.name) for part in layer.layer.tensors)
    ]:
        before, after, path = fixed[0].rank_before, fixed[0].rank_after, fixed[0].path
        plan.refuse("sharded_rank", count=len(fixed), path=path, rank_before=before, rank_after=after)


def _fsdp_keeper(owner: torch.nn.Module, name: str) -> object | None:
    """FSDP2's record of a parameter, which has the sharded parameter even while it is gathered; None without FSDP2.

    During a forward, FSDP2 replaces each sharded parameter of a module by one that holds the whole weight, and puts the
    sharded one back afterwards. The root's weights stay gathered until the next backward, or until ``reshard()``::

        model = fully_shard(PeftModel.from_pretrained(base, "first"))
        model(**inputs)                         # lora_A.weight is the whole weight now, and no DTensor
        hotswap_adapter(model, "second")        # refused; without the record, it would write to the whole weight
        model(**inputs)                         # and the next reshard would discard it: the answer of "first", no error

    FSDP has no public way to get from a parameter to its record, in particular not from a module below the one that was
    sharded. But FSDP registers a hook on every owner of a parameter, to be called after a state dict was loaded. The
    hook is a closure, and one of its cells holds the record. Its class is private, so it is found by its name,
    ``FSDPParam``. If PyTorch renames it, ``fsdp weights that are gathered are not written`` in
    ``tests/beyond/test_distributed.py`` fails, as it does if this returns None.
    """
    for hook in owner._load_state_dict_post_hooks.values():
        for cell in getattr(hook, "__closure__", None) or ():
            record = cell.cell_contents
            if type(record).__name__ == "FSDPParam" and record._module_info.param_name == name:
                return record
    return None


def give_shard(parameter: DTensor, fresh: DTensor, journal: Journal) -> None:
    """Replace the memory of a sharded parameter, which may change its shape. The parameter stays the same object.

    ``torch.utils.swap_tensors`` fails if an output of an earlier call is still alive, which may be so in only some of
    the processes.
    """
    clear_gradients([parameter], journal)
    old, part, spec = parameter.data, parameter._local_tensor, parameter._spec
    journal.record(lambda: _become(parameter, old, part, spec))
    # as in `give_memory`, a different dtype in between makes autograd forget the old shape
    other_dtype = torch.float32 if parameter.dtype == torch.float64 else torch.float64
    empty = _spread(torch.empty([0] * fresh.ndim, dtype=other_dtype, device=local_part(fresh).device), fresh)
    for tensor in (empty, fresh):
        _become(parameter, tensor, tensor._local_tensor, tensor._spec)


def _become(parameter: DTensor, other: DTensor, part: torch.Tensor, spec: object) -> None:
    # setting `data` replaces the shape and dtype that PyTorch's core knows; the other two attributes are DTensor's own
    parameter.data, parameter._local_tensor, parameter._spec = other, part, spec
