"""The method as functions of tensors, as `import bdpo` offers them."""

from __future__ import annotations

import math
from typing import get_type_hints

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bdpo
from bdpo.method.functional import BdpoSettings
from bdpo.method.losses import METHODS

LOGP = st.floats(-50, 0, width=32)
MI = st.floats(-5, 5, width=32)


def formula(logps, mi, alpha, beta):
    """Equation of the method, a pair at a time in Python floats."""
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = logps
    shown = [max(i, 0.01) for i in mi]  # the default mi_floor
    share = min(max(shown[1] / sum(shown), 0.05), 0.95)
    margin = alpha * share * (policy_chosen - ref_chosen)
    margin -= alpha * (1 - share) * (policy_rejected - ref_rejected)
    x = -beta * margin
    return max(x, 0) + math.log1p(math.exp(-abs(x)))


@given(
    st.lists(st.tuples(LOGP, LOGP, LOGP, LOGP, MI, MI), min_size=1, max_size=4),
    st.floats(0.1, 4),
    st.floats(0.01, 1),
)
def test_the_loss_is_the_equation_of_each_pair(pairs, alpha, beta):
    columns = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    losses = bdpo.bdpo_loss(*columns, alpha=alpha, beta=beta)
    expected = [formula(pair[:4], pair[4:], alpha, beta) for pair in pairs]
    assert losses.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_equally_understood_with_alpha_2_it_is_dpo():
    """Its gradient on the policy is that of DPO, too; the weights carry none."""
    policy = torch.tensor([[-3.0, -5.0], [-9.0, -4.0]], requires_grad=True)
    reference, mi = torch.tensor([[-4.0, -4.0], [-8.0, -6.0]]), torch.ones(2)
    losses = bdpo.bdpo_loss(*policy, *reference, mi, mi, alpha=2.0, beta=0.5)
    delta = policy - reference
    plain = -torch.nn.functional.logsigmoid(0.5 * (delta[0] - delta[1]))
    torch.testing.assert_close(losses, plain)
    ours, theirs = (torch.autograd.grad(each.sum(), policy, retain_graph=True)[0] for each in (losses, plain))
    torch.testing.assert_close(ours, theirs)


def test_the_weights_are_made_of_the_log_probs_of_the_reference():
    tokens = torch.tensor([4, 5])
    mi_chosen = bdpo.mutual_information(torch.tensor([-2.0, -9.0]), torch.tensor([-6.0, -10.0]), tokens)
    mi_rejected = bdpo.mutual_information(torch.tensor([-7.0, -5.0]), torch.tensor([-8.0, -10.0]), tokens)
    chosen, rejected = bdpo.balance_weights(mi_chosen, mi_rejected, alpha=1.5)
    torch.testing.assert_close(chosen + rejected, torch.full((2,), 1.5))
    assert chosen[0] < rejected[0]  # 1 nat a token against 0.25: the better understood gets less
    assert chosen[1] > rejected[1]


@pytest.mark.parametrize(
    "settings", [{"alpha": -1.0}, {"nll_weight": 1.0}, {"alhpa": 1.0}, {"balance": "all"}]
)
def test_a_setting_without_sense_is_named(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        bdpo.balance_weights(torch.ones(1), torch.ones(1), **settings)


def test_the_settings_are_the_keys_of_the_method():
    """All but those that a loss of four log-probs of one batch has no use for."""
    keys = {name: field.annotation for name, field in METHODS["bdpo"].model_fields.items()}
    assert keys.keys() - {"name", "nll_weight", "reestimate"} == get_type_hints(BdpoSettings).keys()
    assert get_type_hints(BdpoSettings).items() <= keys.items()
