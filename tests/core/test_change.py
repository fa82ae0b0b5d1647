"""A change writes all that it says or nothing: to any number of models, at once or at the end of a block."""

from __future__ import annotations

import pytest
import torch
from models import randn
from torch import nn

from hotswap_lab.core.change import LATEST, Change, apply, clear_gradients, together
from hotswap_lab.core.journal import Journal


@pytest.fixture
def linear() -> nn.Linear:
    return nn.Linear(6, 4, bias=False, dtype=torch.float64)


def resize(linear: nn.Linear, rows: int, source: torch.Tensor | None = None) -> Change:
    """The change that gives a layer another number of rows."""
    change = Change()
    change.resizes.append((linear.weight, randn(rows, 6) if source is None else source))
    change.tables.append(linear._parameters)
    change.sizes.append((linear, "out_features", rows))
    return change


def fail(journal: Journal) -> None:
    raise RuntimeError("no memory left")


def test_nothing_is_written_before_it_is_applied(linear):
    before, change = linear.weight.detach().clone(), Change()
    change.copy(linear.weight, randn(4, 6))
    change.zero(linear.weight)
    assert torch.equal(linear.weight, before)
    latest = LATEST[0]
    apply([change])
    assert not linear.weight.any()
    assert LATEST[0] is not latest


def test_a_cast_is_made_when_the_change_is_made(linear):
    """A failure of it leaves the model alone then; a source that changes later doesn't change the result."""
    source, change = torch.ones(4, 6), Change()
    change.copy(linear.weight, source)
    source.zero_()
    apply([change])
    assert torch.equal(linear.weight, torch.ones(4, 6, dtype=torch.float64))


@pytest.mark.parametrize("steps", ["steps", "last_steps"])
def test_a_step_that_fails_takes_back_the_changes_of_all_models(linear, steps):
    other, table = nn.Linear(6, 4, bias=False), {"r": 4}
    before = [each.weight.detach().clone() for each in (linear, other)]
    first, second = resize(linear, 2), Change()
    first.steps.append(lambda journal: journal.set_item(table, "r", 2))
    second.zero(other.weight)
    getattr(second, steps).append(fail)
    latest = LATEST[0]
    with pytest.raises(RuntimeError, match="no memory left"):
        apply([first, second])
    assert (table, linear.out_features, LATEST[0]) == ({"r": 4}, 4, latest)
    assert [*linear._parameters] == ["weight", "bias"]
    assert all(map(torch.equal, (linear.weight, other.weight), before))


def test_the_last_steps_see_what_the_others_have_done():
    done, change = [], Change()
    change.last_steps.append(lambda journal: done.append("last"))
    change.steps.append(lambda journal: done.append("first"))
    apply([change])
    assert done == ["first", "last"]


def test_a_parameter_of_another_size_is_the_same_object_and_can_be_trained(linear):
    """Also while a graph over its old shape is alive."""
    weight = linear.weight
    old = linear(randn(2, 6)).sum()
    old.backward(retain_graph=True)
    apply([resize(linear, 2, source := randn(2, 6))])
    assert linear.weight is weight
    assert torch.equal(weight, source)
    assert weight.grad is None
    linear(randn(3, 6)).sum().backward()
    assert weight.grad.shape == (2, 6)


def test_gradients_come_back_when_a_change_is_taken_back(linear):
    linear(randn(2, 6)).sum().backward()
    grad, journal = linear.weight.grad, Journal()
    clear_gradients([linear.weight], journal)
    assert linear.weight.grad is None
    journal.roll_back()
    assert linear.weight.grad is grad


def test_a_block_applies_everything_at_its_end(linear):
    zeros = Change()
    zeros.zero(linear.weight)
    with together():
        apply([zeros])
        assert linear.weight.all()
    assert not linear.weight.any()


@pytest.mark.parametrize("where", ["in the block", "at its end"])
def test_a_block_with_an_error_applies_nothing(linear, where):
    zeros, broken = Change(), Change(steps=[fail])
    zeros.zero(linear.weight)
    with pytest.raises(RuntimeError, match="no memory left"), together():  # noqa: PT012
        apply([zeros])
        if where == "in the block":
            fail(Journal())
        apply([broken])
    assert linear.weight.all()
