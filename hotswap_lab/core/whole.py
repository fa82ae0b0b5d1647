"""What is said of the plan as a whole: capacity, shards, compiled graphs, and which layers the config names."""

from __future__ import annotations

from collections.abc import Iterable

from peft.tuners.mixed import MixedModel
from peft.tuners.tuners_utils import BaseTunerLayer

from ..beyond.base_values import lost_originals
from ..shards import is_trained_in_parallel
from .compiled import blind_spot
from .draft import Draft
from .errors import listing
from .host import Host
from .plan import Action, LayerPlan
from .slot import SlotLayer
from .words import merged_beside, needs_originals


def check_capacity(draft: Draft) -> None:
    """Refuses ranks that a prepared layer has no room for, all of them in one refusal."""
    lacking = [
        plan
        for plan in draft.layers
        if plan.action is Action.PAD and plan.settings.rank > plan.layer.tensors[0].capacity
    ]
    if lacking:
        highest = max(plan.settings.rank for plan in lacking)
        room = max(plan.layer.tensors[0].capacity for plan in lacking)
        draft.refuse(
            f"The adapter's rank is higher than the model was prepared for, at {len(lacking)} layers.",
            found=f"rank {highest}, for example at {lacking[0].path}",
            expected=f"rank {room} at most",
            next_step=f"before compiling, prepare the model (or make the pool) with target_rank={highest}",
        )


def check_base(draft: Draft) -> None:
    """Refuses to turn layers off by base weights that contain another adapter: DoRA's magnitude is their norm then."""
    if not draft.slot.reads_base:
        return
    off = [plan.layer for plan in draft.layers if plan.settings is None]
    if others := _merged_where_read(draft.slot.host, off):
        draft.refusals.append(merged_beside(draft.slot.adapter_name, others))


def _merged_where_read(host: Host, layers: Iterable[SlotLayer]) -> list[str]:
    """The adapters that are merged into base weights which turning these layers off goes by."""
    off = [layer.module for layer in layers if any(tensor.off is not None for tensor in layer.tensors)]
    if off and isinstance(host.tuner, MixedModel):
        # layers of other methods may be around these
        read = {id(module.get_base_layer()) for module in off}
        tuners = (module for module in host.base.modules() if isinstance(module, BaseTunerLayer))
        off = [module for module in tuners if id(module.get_base_layer()) in read]
    return sorted({name for module in off for name in module.merged_adapters})


def turned_off(draft: Draft) -> list[LayerPlan]:
    """What happens to the layers that are turned off now, and were not before."""
    return [plan for plan in draft.layers if plan.action is Action.OFF and plan.rank_before is not None]


def check_embeddings(draft: Draft) -> None:
    """Refuses to turn embeddings off where the adapter's file may have replaced the weights below them."""
    names = {f"{plan.path}.weight" for plan in turned_off(draft) if plan.layer in draft.slot.embeddings}
    if not names:
        return
    if lost := sorted(names & lost_originals(draft.slot.host, draft.slot.adapter_name)):
        refusal = needs_originals(
            found=f"embeddings that PEFT replaced when it loaded the adapter: {listing(lost, 3)}",
            expected="embeddings of which the originals are known, or an adapter that is on them, too",
            next_step="load first an adapter that is not on embeddings, and prepare the model for this one",
        )
        draft.refusals.append(refusal)


def check_shards(draft: Draft) -> None:
    """Refuses what processes that share the parameters can't do each on its own.

    New shapes, where somebody has noted the old ones and would go by them; and magnitudes that are turned off, since
    they are then worked out from whole base weights.
    """
    changed = [plan for plan in draft.layers if plan.action in (Action.RESIZE, Action.ADD)]
    if changed:
        check_parallel_training(draft, len(changed), f"another shape at {changed[0].path}")
    if not draft.slot.is_sharded:
        return
    off = [plan.layer for plan in draft.layers if plan.settings is None]
    read = [layer for layer in off for each in layer.tensors if each.off is not None and each.is_shard]
    if read:
        draft.refuse(
            "DoRA can't be turned off in a model that is spread over processes.",
            found=f"{len(read)} layers that the new adapter is not on, such as {read[0].path}",
            expected="an adapter on all layers of the loaded one: other magnitudes are worked out from base weights",
            next_step="load this adapter into a fresh base model and shard that",
        )
    resized = [plan for plan in draft.layers if plan.action is Action.RESIZE]
    fixed = [plan for plan in resized if any(each.has_fixed_shape for each in plan.layer.tensors)]
    if fixed:
        draft.refuse(
            f"The rank of an adapter can't be changed while FSDP shards it, as it would at {len(fixed)} layers.",
            found=f"rank {fixed[0].rank_before} at {fixed[0].path}, and {fixed[0].rank_after} in the adapter",
            expected="the rank that was there when fully_shard was called",
            next_step="swap before fully_shard, or load this adapter into a fresh base model and shard that",
        )


def check_frozen(draft: Draft) -> None:
    """A magnitude or bias is frozen where its layer is off, which who trains in parallel would not notice."""
    if not draft.slot.has_more:
        return
    turned = [
        plan
        for plan in draft.layers
        if (plan.settings is None) != (plan.rank_before is None)
        and any(write.target.rank_axis is None for write in plan.tensors)
    ]
    if turned:
        check_parallel_training(draft, len(turned), f"a magnitude or bias to freeze or unfreeze at {turned[0].path}")


def check_parallel_training(draft: Draft, layers: int, found: str) -> None:
    """Refuses to change which parameters are trained where gradients are averaged over processes by the old ones."""
    if is_trained_in_parallel(draft.slot.host.root, draft.slot.parameters):
        draft.refuse(
            f"DistributedDataParallel would no longer average the gradients of {layers} layers.",
            found=f"{found}, in parameters that are trained",
            expected="the parameters that were there when the model was wrapped",
            next_step="swap in the model itself, then wrap it in DistributedDataParallel again",
        )


def check_compiled(draft: Draft) -> None:
    """Refuses a swap that a compiled graph would not notice."""
    if not draft.compiled and not draft.is_prepared:
        return
    if reason := blind_spot(draft.compiled, prepared=draft.is_prepared and draft.finish().writes_values_only):
        draft.refuse(
            "The compiled model would go on with the old adapter.",
            found=reason,
            expected="a graph that reads the adapter's weights at each call, and guards that watch the rest",
            next_step="compile the model without this setting, after prepare_model_for_compiled_hotswap",
        )


def note_missing_targets(draft: Draft) -> None:
    named = [
        plan.path
        for plan in draft.layers
        if plan.action is Action.OFF and draft.slot.method.targets(draft.config, plan.path)
    ]
    if named:
        draft.notes.append(
            f"the config targets {len(named)} layers that the file has no tensors for ({listing(named, 2)}); "
            "they are turned off"
        )


def retarget_config(draft: Draft) -> None:
    """Makes the config name exactly the layers that the tensors are for, so that it reloads as what it is."""
    targets = draft.slot.method.targets
    if draft.config.target_modules is None or any(
        targets(draft.config, plan.path) != (plan.settings is not None) for plan in draft.layers
    ):
        draft.config.target_modules = {plan.path for plan in draft.layers if plan.settings is not None}
        draft.config.layers_to_transform = draft.config.layers_pattern = draft.config.exclude_modules = None
