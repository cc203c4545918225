from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bdpo.method.losses import METHODS, Bdpo
from bdpo.method.mi import MI_FLOOR, mi_floor_of, mutual_information

MI = st.floats(-5, 5, allow_nan=False, width=32)

RULES = st.sampled_from(["ratio", "softmax", "none"])


def weights(chosen, rejected, **method):
    pair = torch.tensor([chosen]).double(), torch.tensor([rejected]).double()
    return tuple(weight.item() for weight in Bdpo(**method).weights(*pair))


def test_mutual_information_is_per_token():
    got = mutual_information(torch.tensor([-3.0]), torch.tensor([-9.0]), torch.tensor([4]))
    assert got.item() == (-3 + 9) / 4


def test_ratio_gives_the_better_understood_response_less():
    # s_w = 0.6, s_l = 0.2: the chosen response gets 0.2 / (0.6 + 0.2) of alpha
    assert weights(0.6, 0.2, alpha=1.5) == pytest.approx((1.5 * 0.25, 1.5 * 0.75))


def test_softmax_rule():
    share = 1 / (1 + math.exp(-2 * (0.2 - 0.6)))
    assert weights(0.6, 0.2, alpha=1, balance="softmax", sharpness=2.0) == pytest.approx((share, 1 - share))


def test_sharpness_is_an_exponent():
    assert weights(0.6, 0.2, alpha=1, sharpness=2.0)[0] == pytest.approx(0.2**2 / (0.6**2 + 0.2**2))
    assert weights(0.6, 0.2, alpha=1, sharpness=-1.0)[0] == pytest.approx(0.6 / (0.6 + 0.2))
    assert weights(0.6, 0.2, alpha=1, sharpness=0.0) == weights(0.6, 0.2, alpha=1, balance="none")


def test_floor_and_clip():
    # the rejected side is floored at 0.01: its share 0.6 / 0.61 is above 1 - min_share
    assert weights(0.6, -3.0, alpha=1) == pytest.approx((0.05, 0.95))
    assert weights(0.6, -3.0, alpha=1, min_share=0.0)[0] == pytest.approx(0.01 / 0.61)


def test_none_with_alpha_2_is_plain_dpo():
    assert weights(0.6, 0.2, alpha=2, balance="none") == (1.0, 1.0)


@given(MI, MI, RULES, st.floats(0.1, 4), st.floats(-3, 3))
def test_weights_sum_to_alpha_and_swap_with_the_responses(chosen, rejected, rule, alpha, sharpness):
    method = {"balance": rule, "alpha": alpha, "sharpness": sharpness}
    weight_chosen, weight_rejected = weights(chosen, rejected, **method)
    assert weight_chosen + weight_rejected == pytest.approx(alpha)
    assert min(weight_chosen, weight_rejected) >= 0.05 * alpha * (1 - 1e-9)
    assert weights(rejected, chosen, **method) == pytest.approx((weight_rejected, weight_chosen))


@given(MI, MI, MI, st.sampled_from(["ratio", "softmax"]))
def test_more_mutual_information_never_gives_more_weight(low, high, other, rule):
    low, high = sorted((low, high))
    assert weights(high, other, balance=rule)[0] <= weights(low, other, balance=rule)[0]


def test_balance_weights_alone_sum_to_one():
    pair = torch.tensor([0.6]), torch.tensor([0.2])
    assert sum(weight.item() for weight in METHODS["dpo_bw"]().weights(*pair)) == pytest.approx(1)


def test_the_floor_of_a_report_is_that_of_the_method_if_it_has_one():
    assert mi_floor_of(Bdpo(mi_floor=0.2)) == 0.2
    assert mi_floor_of(METHODS["dpo"]()) == MI_FLOOR
