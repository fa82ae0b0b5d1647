"""A plan and a swap agree, whatever the two adapters are: both refuse, or both find the pair right."""

from __future__ import annotations

import contextlib
import io
import itertools
import warnings

import pytest
import torch
from adapters import METHODS, save_all
from lengths import few_of
from models import Kind, answer
from oracle import untouched
from peft import PeftModel

from hotswap_lab import HotswapError, hotswap_adapter, plan_hotswap, verify_hotswap
from hotswap_lab.__main__ import main

#: PEFT or PyTorch can't compute these in float64
NOT_EXACT = ("PSOFT", "target_parameters")


def _swapped(kind: Kind, first: str, second: str, dtype: torch.dtype) -> bool:
    """Whether the swap is possible, which the plan, the swap and the comparison with a fresh load must agree on."""
    base, inputs = kind.base().to(dtype), kind.inputs()
    if isinstance(inputs, torch.Tensor) and inputs.is_floating_point():
        inputs = inputs.to(dtype)
    originals = {name: each.clone() for name, each in base.state_dict().items()}
    model = PeftModel.from_pretrained(base, first).eval()
    plan = plan_hotswap(model, second, base_weights=originals)
    if not plan.ok:
        with untouched(model), pytest.raises(HotswapError) as caught:
            hotswap_adapter(model, second, base_weights=originals)
        assert [each.summary for each in caught.value.refusals] == [each.summary for each in plan.refusals]
        return False
    hotswap_adapter(model, second, base_weights=originals)
    fresh = PeftModel.from_pretrained(kind.base().to(dtype), second).eval()
    expected = answer(fresh, inputs)
    torch.testing.assert_close(answer(model, inputs), expected, rtol=0, atol=1e-9 if dtype == torch.float64 else 1e-4)
    assert verify_hotswap(model, second, base=lambda: kind.base().to(dtype), inputs=inputs)
    return True


def _command(*arguments: str) -> int:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        code = main([*arguments])
    return code


#: by name: the kind of model, and the configs, each of which is swapped for each of the others
TABLE: dict[str, tuple[Kind, list]] = dict(METHODS)
#: of several methods
TABLE["other methods"] = METHODS["LoHa"][0], [METHODS[name][1][0] for name in ("LoHa", "IA3", "DoRA", "PromptTuning")]
FEW = ("lora_bias", "DoRA", "modules_to_save", "trainable tokens", "embeddings, tied", "LoHa", "other methods")


@pytest.mark.parametrize("name", few_of(TABLE, FEW))
def test_what_a_plan_refuses_a_swap_refuses(tmp_path, name):
    """Here in Python; and `hotswap-lab plan`, whose base has no values: what it decides is what `verify` finds."""
    kind, configs = TABLE[name]
    (tmp_path / "adapters").mkdir()
    folders = save_all(tmp_path / "adapters", *configs, kind=kind)
    # in float64 before an adapter is loaded, so that nothing is rounded to float32
    dtype = torch.float32 if name in NOT_EXACT else torch.float64
    base, is_of_transformers = str(tmp_path / "base"), hasattr(model := kind.base().to(dtype), "save_pretrained")
    if is_of_transformers:
        model.save_pretrained(base)
    decided = set()
    for first, second in itertools.permutations(folders, 2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = 0 if _swapped(kind, first, second, dtype) else 1
            if is_of_transformers:
                codes = _command("plan", base, first, second), _command("verify", base, first, second)
                assert set(codes) <= {expected, 3}, (codes, first, second)
                decided.add(codes[0])
    assert 0 in decided or name not in ("lora_bias", "DoRA")
