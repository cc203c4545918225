"""Losses against formulas written here in float64, and against TRL on the same batch."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch import tensor
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from bdpo.method.base import PairLogps
from bdpo.method.losses import METHODS
from bdpo.models.logps import LogpsModel
from tests.support.helpers import encoded_pairs, logps_of, tiny_qwen2

FIELDS = list(PairLogps.__dataclass_fields__)

WITHOUT_REFERENCE = [name for name, method in METHODS.items() if not method.requires_reference]

WITH_REFERENCE = [name for name in METHODS if name not in [*WITHOUT_REFERENCE, "safedpo"]]

ANCHORED = [name for name, method in METHODS.items() if "nll_weight" in method.model_fields]

BALANCED = [name for name, method in METHODS.items() if "balance_on" in method.model_fields]

UNSAFE = [(False, False), (False, True), (True, False), (True, True)]  # chosen, rejected


def random_pairs(pairs=8, seed=0):
    """Log-probs below zero, about a nat apart; every combination of safety labels."""
    generator = torch.Generator().manual_seed(seed)
    columns = {name: torch.randn(pairs, generator=generator, dtype=torch.float64) for name in FIELDS}
    for name in FIELDS:
        columns[name] = columns[name].abs() if name.startswith("weight") else -columns[name].abs()
    for name in ("chosen_tokens", "rejected_tokens"):
        columns[name] = torch.randint(1, 9, (pairs,), generator=generator).double()
    for side, name in enumerate(("chosen_unsafe", "rejected_unsafe")):
        columns[name] = tensor([UNSAFE[i % 4][side] for i in range(pairs)])
    return PairLogps(**columns)


def pairs_of(**columns):
    """Pairs of one value a column, the others being zero: scalars of shape (1,), float32."""
    defaults = dict.fromkeys(FIELDS, 0.0) | {"chosen_tokens": 1, "rejected_tokens": 1}
    return PairLogps(**{name: torch.as_tensor([v]) for name, v in (defaults | columns).items()})


def nll_of_sigmoid(x):
    return math.log1p(math.exp(-x))


def weighted(weight):
    """DPO with the two responses weighed."""

    def formula(p, m):
        a_w, a_l = weight(p.weight_chosen, m), weight(p.weight_rejected, m)
        return nll_of_sigmoid(m.beta * (a_w * p.delta_w - a_l * p.delta_l))

    return formula


def dpop(p, m):
    return nll_of_sigmoid(m.beta * (p.delta_w - p.delta_l - m.dpop_lambda * max(0.0, -p.delta_w)))


def ipo(p, m):
    return (p.delta_w / p.chosen_tokens - p.delta_l / p.rejected_tokens - 1 / (2 * m.beta)) ** 2


def both_ways(p, m):
    h = m.beta * (p.delta_w - p.delta_l)
    return nll_of_sigmoid(h), nll_of_sigmoid(-h)


def cdpo(p, m):
    right, wrong = both_ways(p, m)
    return (1 - m.label_smoothing) * right + m.label_smoothing * wrong


def robust(p, m):
    right, wrong = both_ways(p, m)
    return ((1 - m.label_smoothing) * right - m.label_smoothing * wrong) / (1 - 2 * m.label_smoothing)


def cpo(p, m):
    likelihood = -p.policy_chosen / p.chosen_tokens
    return nll_of_sigmoid(m.beta * (p.policy_chosen - p.policy_rejected)) + m.cpo_alpha * likelihood


def simpo(p, m):
    per_token = p.policy_chosen / p.chosen_tokens - p.policy_rejected / p.rejected_tokens
    return nll_of_sigmoid(m.beta * per_token - m.simpo_gamma)


def log_odds(log_p):
    return math.log(math.exp(log_p) / (1 - math.exp(log_p)))


def orpo(p, m):
    chosen, rejected = p.policy_chosen / p.chosen_tokens, p.policy_rejected / p.rejected_tokens
    return -chosen + m.beta * nll_of_sigmoid(log_odds(chosen) - log_odds(rejected))


def bpo(p, m):
    return nll_of_sigmoid(m.beta * min(p.delta_w, -m.bpo_alpha * p.delta_l))


def cal_dpo(p, m):
    target = 1 / (2 * m.beta)
    return nll_of_sigmoid(p.delta_w - p.delta_l) + (p.delta_w - target) ** 2 + (p.delta_l + target) ** 2


def sft(p, m):
    return -p.policy_chosen / p.chosen_tokens


def safedpo(p, m):
    h = m.beta * (p.delta_w - p.delta_l)
    return {
        (False, False): nll_of_sigmoid(h),
        (False, True): nll_of_sigmoid(h - m.safedpo_delta),
        (True, False): nll_of_sigmoid(-h - m.safedpo_delta),
        (True, True): 0.0,
    }[bool(p.chosen_unsafe), bool(p.rejected_unsafe)]


NAMED = (dpop, ipo, cdpo, robust, safedpo, bpo, cal_dpo, cpo, simpo, orpo, sft)

FORMULAS = {
    "dpo": weighted(lambda a, m: 1.0),
    "bdpo": weighted(lambda a, m: a),
    "dpo_bw": weighted(lambda a, m: a),
    "dpo_sf": weighted(lambda a, m: m.alpha / 2),
} | {formula.__name__: formula for formula in NAMED}


def scalars(pairs, i):
    row = {name: getattr(pairs, name)[i].item() for name in FIELDS}
    deltas = {
        f"delta_{letter}": row[f"policy_{side}"] - row[f"reference_{side}"]
        for letter, side in (("w", "chosen"), ("l", "rejected"))
    }
    return SimpleNamespace(**row, **deltas)


def test_every_loss_of_the_registry_has_its_formula_here():
    assert METHODS.keys() == FORMULAS.keys()


KEYS = {
    "alpha": 1.7,
    "beta": 0.3,
    "label_smoothing": 0.2,
    "cpo_alpha": 0.6,
    "dpop_lambda": 0.8,
    "simpo_gamma": 0.7,
    "bpo_alpha": 0.8,
    "safedpo_delta": 3.0,
}


@pytest.mark.parametrize("name", METHODS)
def test_formula(name):
    method = METHODS[name](**{key: value for key, value in KEYS.items() if key in METHODS[name].model_fields})
    pairs = random_pairs()
    loss = method.loss(pairs).loss
    assert loss.shape == (8,)
    assert loss.tolist() == pytest.approx([FORMULAS[name](scalars(pairs, i), method) for i in range(8)])


@pytest.mark.parametrize("name", ANCHORED)
def test_the_anchor_is_added_to_the_loss(name):
    """To that of every pair which has a loss: SafeDPO has none for two unsafe responses."""
    pairs = random_pairs()
    plain, anchored = METHODS[name]().loss(pairs), METHODS[name](nll_weight=0.7).loss(pairs)
    for i in range(8):
        p = scalars(pairs, i)
        likelihood = -p.policy_chosen / p.chosen_tokens
        if name == "safedpo" and p.chosen_unsafe:
            likelihood = 0.0 if p.rejected_unsafe else -p.policy_rejected / p.rejected_tokens
        assert anchored.loss[i].item() == pytest.approx(plain.loss[i].item() + 0.7 * likelihood)
    assert "nll_loss" in anchored.metrics
    assert "nll_loss" not in plain.metrics


CHANGED = KEYS | {"balance": "softmax", "sharpness": 3.0, "mi_floor": 0.5, "min_share": 0.4}
CHANGED |= {"balance_on": "gradient", "side_weight": "alpha", "nll_weight": 0.7}


@pytest.mark.parametrize(("name", "key"), [(n, k) for n, m in METHODS.items() for k in m.model_fields])
def test_every_key_of_a_method_changes_its_loss(name, key):
    """Of pairs whose weights are the method's own, from a mutual information that stays what it is."""
    generator = torch.Generator().manual_seed(1)
    mi = [torch.rand(8, generator=generator, dtype=torch.float64) for _ in range(2)]

    def loss(method):
        weights = dict(zip(("weight_chosen", "weight_rejected"), method.weights(*mi), strict=True))
        return method.loss(replace(random_pairs(), **weights)).loss

    if key not in ("name", "reestimate"):
        assert not torch.allclose(loss(METHODS[name](**{key: CHANGED[key]})), loss(METHODS[name]()))


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_rewards_are_those_of_dpo_whatever_the_method(name):
    pairs, method = random_pairs(), METHODS[name](beta=0.3)
    metrics = method.loss(pairs).metrics
    for i in range(8):
        p = scalars(pairs, i)
        assert metrics["rewards/chosen"][i].item() == pytest.approx(0.3 * p.delta_w)
        assert metrics["rewards/rejected"][i].item() == pytest.approx(0.3 * p.delta_l)
        assert metrics["rewards/margins"][i].item() == pytest.approx(0.3 * (p.delta_w - p.delta_l))
        assert metrics["rewards/accuracies"][i].item() == (p.delta_w > p.delta_l)
        assert metrics["logps/chosen"][i].item() == p.policy_chosen
        assert metrics["logps/rejected"][i].item() == p.policy_rejected


@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_looks_at_the_responses_that_it_names(name, side):
    """The other response is not forwarded, so its log-probs are NaN."""
    pairs, method = random_pairs(), METHODS[name]()
    unknown = replace(pairs, **{f"policy_{side}": torch.full((8,), math.nan, dtype=torch.float64)})
    output, without = method.loss(pairs), method.loss(unknown)
    looked_at = side in method.responses
    assert torch.equal(output.loss, without.loss) != looked_at
    assert any(values.isnan().any() for values in without.metrics.values()) == looked_at


@pytest.mark.parametrize(
    ("name", "keys"), [*((n, {}) for n in METHODS), *((n, {"nll_weight": 1.0}) for n in ANCHORED)]
)
def test_a_method_logs_the_metrics_that_it_names(name, keys):
    method = METHODS[name](**keys)
    assert sorted(method.metrics) == sorted(method.loss(random_pairs()).metrics)


@pytest.mark.parametrize("name", METHODS)
def test_metrics_require_no_gradient(name):
    """They are summed over micro-batches: with a graph each would keep its activations alive."""
    pairs = random_pairs()
    pairs = replace(pairs, policy_chosen=pairs.policy_chosen.requires_grad_())
    output = METHODS[name]().loss(pairs)
    assert output.loss.requires_grad
    assert not [metric for metric, values in output.metrics.items() if values.requires_grad]


@pytest.mark.parametrize(
    ("name", "keys"),
    [("orpo", {}), *((name, {"nll_weight": 0.5}) for name in ANCHORED if name != "safedpo")],  # which swaps
)
def test_the_logged_likelihood_is_a_loss_per_token(name, keys):
    pairs = random_pairs()
    logged = METHODS[name](**keys).loss(pairs).metrics["nll_loss"]
    assert logged.tolist() == pytest.approx((-pairs.policy_chosen / pairs.chosen_tokens).tolist())


def test_equal_rewards_are_not_accurate():
    assert METHODS["dpo"]().loss(pairs_of()).metrics["rewards/accuracies"] == 0


def test_balance_margins_are_what_bdpo_trains():
    pairs, method = random_pairs(), METHODS["bdpo"](beta=0.3)
    output = method.loss(pairs)
    assert [nll_of_sigmoid(m.item()) for m in output.metrics["balance/margins"]] == pytest.approx(
        output.loss.tolist()
    )


@pytest.mark.parametrize("name", BALANCED)
def test_weights_on_the_gradient_leave_the_loss_that_of_dpo(name):
    """The gradients are -β·σ(-βh)·a_w and β·σ(-βh)·a_l, h being unweighted."""
    pairs, method = random_pairs(), METHODS[name](beta=0.3, balance_on="gradient")
    policy = pairs.policy_chosen.requires_grad_(), pairs.policy_rejected.requires_grad_()
    output = method.loss(pairs)
    assert torch.equal(output.loss, METHODS["dpo"](beta=0.3).loss(pairs).loss)
    assert torch.equal(output.metrics["balance/margins"], output.metrics["rewards/margins"])
    gradients = torch.autograd.grad(output.loss.sum(), policy)
    for i in range(8):
        p = scalars(pairs, i)
        slope = 0.3 / (1 + math.exp(0.3 * (p.delta_w - p.delta_l)))
        assert gradients[0][i].item() == pytest.approx(-slope * p.weight_chosen)
        assert gradients[1][i].item() == pytest.approx(slope * p.weight_rejected)


@pytest.mark.parametrize("settings", [{"balance_on": "margin"}, {"balance_on": "gradient"}])
def test_with_alpha_2_and_equal_shares_bdpo_is_dpo_wherever_the_weights_act(settings):
    pairs, mi = random_pairs(), torch.rand(2, 8, dtype=torch.float64)
    bdpo = METHODS["bdpo"](alpha=2.0, balance="none", **settings)
    chosen, rejected = bdpo.weights(*mi)
    policy = pairs.policy_chosen.requires_grad_(), pairs.policy_rejected.requires_grad_()
    losses = (
        bdpo.loss(replace(pairs, weight_chosen=chosen, weight_rejected=rejected)).loss,
        METHODS["dpo"]().loss(pairs).loss,
    )
    assert torch.equal(*losses)
    for ours, theirs in zip(*(torch.autograd.grad(loss.sum(), policy) for loss in losses), strict=True):
        assert torch.equal(ours, theirs)


def test_dpo_sf_with_alpha_1_for_each_response_is_dpo():
    pairs = random_pairs()
    each = METHODS["dpo_sf"](alpha=1.0, side_weight="alpha").loss(pairs).loss
    half = METHODS["dpo_sf"](alpha=2.0).loss(pairs).loss
    dpo = METHODS["dpo"]().loss(pairs).loss
    assert torch.equal(each, dpo)
    assert torch.equal(half, dpo)


def test_before_training_bpo_gives_either_response_half_of_the_gradient():
    chosen, rejected = (torch.zeros(1, requires_grad=True) for _ in range(2))
    pairs = replace(pairs_of(), policy_chosen=chosen, policy_rejected=rejected)
    loss = METHODS["bpo"](beta=0.2, bpo_alpha=0.3).loss(pairs).loss
    gradients = torch.autograd.grad(loss.sum(), (chosen, rejected))
    assert [g.item() for g in gradients] == pytest.approx([-0.2 / 2 / 2, 0.2 * 0.3 / 2 / 2])


def test_orpo_is_finite_for_a_response_that_is_certain():
    """A log-prob that is rounded to zero, of the chosen response and of the rejected one."""
    for sides in ({"policy_rejected": -3.0}, {"policy_chosen": -3.0}):
        pairs = pairs_of(**sides)
        policy = pairs.policy_chosen.requires_grad_(), pairs.policy_rejected.requires_grad_()
        loss = METHODS["orpo"]().loss(pairs).loss
        assert torch.isfinite(torch.stack([loss, *torch.autograd.grad(loss.sum(), policy)])).all()


def test_safedpo_swaps_a_pair_in_its_metrics_too():
    """Of the third of `UNSAFE` only the rejected response is safe: it is what is preferred."""
    pairs, method = random_pairs(), METHODS["safedpo"]()
    metrics = method.loss(pairs).metrics
    dpo = METHODS["dpo"]().loss(pairs).metrics
    turned = [i % 4 == 2 for i in range(8)]
    for chosen, rejected in (("chosen", "rejected"), ("rejected", "chosen")):
        for name in ("rewards", "logps"):
            expected = torch.where(tensor(turned), dpo[f"{name}/{rejected}"], dpo[f"{name}/{chosen}"])
            assert torch.equal(metrics[f"{name}/{chosen}"], expected)


@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_those_of_the_formula(name):
    pairs = random_pairs()
    policy = pairs.policy_chosen.requires_grad_(), pairs.policy_rejected.requires_grad_()

    def loss(chosen, rejected):
        moved = replace(pairs, policy_chosen=chosen, policy_rejected=rejected)
        return METHODS[name]().loss(moved).loss

    assert torch.autograd.gradcheck(loss, policy)


@pytest.mark.parametrize("name", METHODS)
@given(margin=st.floats(-1e4, 1e4), unsafe=st.sampled_from(UNSAFE))
def test_loss_and_gradient_stay_finite(name, margin, unsafe):
    chosen = tensor(margin, dtype=torch.float32)
    pairs = pairs_of(
        policy_chosen=chosen,
        weight_chosen=1.0,
        weight_rejected=1.0,
        chosen_unsafe=unsafe[0],
        rejected_unsafe=unsafe[1],
    )
    pairs.policy_chosen.requires_grad_()
    loss = METHODS[name]().loss(pairs).loss
    (gradient,) = torch.autograd.grad(loss.sum(), pairs.policy_chosen)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(gradient).all()


@given(margin=st.floats(-50, 50))
def test_swapping_the_responses_mirrors_the_margin_of_dpo(margin):
    """-log σ(βh) + log σ(-βh) = -βh, and the reward margin changes its sign."""
    h = tensor(margin, dtype=torch.float64)
    method = METHODS["dpo"]()
    there = method.loss(pairs_of(policy_chosen=h))
    back = method.loss(pairs_of(policy_rejected=h))
    assert there.metrics["rewards/margins"].item() == -back.metrics["rewards/margins"].item()
    assert (there.loss - back.loss).item() == pytest.approx(-method.beta * margin, abs=1e-9)


@pytest.mark.parametrize("name", ["bdpo", "dpo", "dpo_bw", "dpo_sf", "dpop", "cdpo", "robust", "bpo"])
def test_before_training_the_loss_is_ln_2_whatever_the_weights(name):
    pairs = random_pairs()
    pairs = replace(pairs, policy_chosen=pairs.reference_chosen, policy_rejected=pairs.reference_rejected)
    expected = torch.full((8,), math.log(2), dtype=torch.float64)
    torch.testing.assert_close(METHODS[name]().loss(pairs).loss, expected)
    if name in BALANCED:
        torch.testing.assert_close(METHODS[name](balance_on="gradient").loss(pairs).loss, expected)


@pytest.mark.parametrize("name", WITHOUT_REFERENCE)
def test_a_loss_without_reference_looks_at_no_score(name):
    pairs, method = random_pairs(), METHODS[name]()
    unknown = torch.full((8,), math.nan)
    scored = ("reference_chosen", "reference_rejected", "weight_chosen", "weight_rejected")
    unscored = method.loss(replace(pairs, **dict.fromkeys(scored, unknown)))
    scored = method.loss(pairs)
    assert torch.equal(unscored.loss, scored.loss)
    assert all(torch.equal(unscored.metrics[key], value) for key, value in scored.metrics.items())


@pytest.mark.parametrize("name", METHODS)
def test_a_method_requires_what_its_loss_looks_at(name):
    """Pairs are scored for methods that require a reference, and refused without labels that one requires."""
    pairs, method = random_pairs(), METHODS[name]()
    other_reference = replace(pairs, reference_chosen=pairs.reference_chosen - 1)
    other_labels = replace(pairs, chosen_unsafe=~pairs.chosen_unsafe, rejected_unsafe=~pairs.rejected_unsafe)
    loss, of_reference, of_labels = (
        method.loss(each).loss for each in (pairs, other_reference, other_labels)
    )
    assert method.requires_reference != torch.equal(of_reference, loss)
    assert method.requires_safety_labels != torch.equal(of_labels, loss)


def test_without_label_noise_cdpo_and_robust_are_dpo():
    pairs = random_pairs()
    dpo = METHODS["dpo"]().loss(pairs).loss
    for name in ("cdpo", "robust"):
        assert torch.equal(METHODS[name](label_smoothing=0.0).loss(pairs).loss, dpo)


SHAPES = [(3, 5, 8), (9, 1, 4), (1, 14, 2)]  # tokens of prompt, chosen, rejected


@pytest.fixture(scope="module")
def batch():
    """Two models, the pairs, and what both say of them."""
    pairs = encoded_pairs(SHAPES)
    policy, reference = tiny_qwen2(seed=0), tiny_qwen2(seed=1)
    ours = copy.deepcopy(policy)

    def logps(model, who):
        sides = logps_of(LogpsModel(model, max_length=128), pairs)
        return {f"{who}_{side}": v for side, v in zip(("chosen", "rejected"), sides, strict=True)}

    with torch.no_grad():
        references = logps(copy.deepcopy(reference), "reference")
    _, chosen, rejected = (tensor(column) for column in zip(*SHAPES, strict=True))
    unused = {name: torch.zeros(3) for name in FIELDS}
    tokens = {"chosen_tokens": chosen, "rejected_tokens": rejected}
    known = PairLogps(**unused | references | tokens | logps(ours, "policy"))
    return SimpleNamespace(encoded=pairs, policy=policy, reference=reference, ours=ours, logps=known)


class TestAgainstTRL:
    """One batch of a tiny model through both."""

    def dpo_trainer(self, tmp_path, tiny_chat, batch, **settings):
        arguments = DPOConfig(
            str(tmp_path),
            label_smoothing=0.2,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            report_to=[],
            **settings,
        )
        text = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
        return DPOTrainer(
            copy.deepcopy(batch.policy),
            batch.reference,
            arguments,
            train_dataset=text,
            processing_class=copy.deepcopy(tiny_chat.tokenizer),  # TRL gives it a padding token
        )

    def dpo_loss(self, trainer, encoded):
        rows = [{f"{part}_ids": ids for part, ids in pair._asdict().items()} for pair in encoded]
        loss = trainer.compute_loss(trainer.model.train(), DataCollatorForPreference(pad_token_id=0)(rows))
        loss.backward()
        return loss.squeeze()

    @pytest.mark.parametrize(
        ("name", "loss_type"), [("dpo", "sigmoid"), ("ipo", "ipo"), ("robust", "robust")]
    )
    def test_loss_rewards_and_gradients(self, tmp_path, tiny_chat, batch, name, loss_type):
        trainer = self.dpo_trainer(tmp_path, tiny_chat, batch, loss_type=loss_type, beta=0.1)
        loss = self.dpo_loss(trainer, batch.encoded)

        output = METHODS[name](**{"label_smoothing": 0.2} if name == "robust" else {}).loss(batch.logps)
        batch.ours.zero_grad()
        output.loss.mean().backward(retain_graph=True)
        torch.testing.assert_close(output.loss.mean(), loss, rtol=1e-5, atol=0)
        for metric in (
            "rewards/chosen",
            "rewards/rejected",
            "rewards/margins",
            "rewards/accuracies",
            "logps/chosen",
        ):
            theirs = trainer._metrics["train"][metric][0]
            assert output.metrics[metric].mean().item() == pytest.approx(theirs, rel=1e-5), metric
        same_gradients(batch.ours, trainer.model)

    def test_nll_weight(self, tmp_path, tiny_chat, batch):
        """TRL's weighted mixture, a pair at a time: its likelihood is a mean over all tokens of a batch."""
        mixture = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7], "beta": 0.1}
        trainer = self.dpo_trainer(tmp_path, tiny_chat, batch, **mixture)
        output = METHODS["dpo"](nll_weight=0.7).loss(batch.logps)
        for i, pair in enumerate(batch.encoded):
            trainer.model.zero_grad()
            batch.ours.zero_grad()
            loss = self.dpo_loss(trainer, [pair])
            output.loss[i].backward(retain_graph=True)
            torch.testing.assert_close(output.loss[i], loss, rtol=1e-5, atol=0)
            same_gradients(batch.ours, trainer.model)

    def test_cal_dpo(self, tmp_path, tiny_chat, batch):
        """The sum of two of TRL's losses: DPO with β = 1, and SPPO's squared distances from ±1/(2β)."""
        dpo, sppo = (
            self.dpo_trainer(tmp_path, tiny_chat, batch, loss_type=loss_type, beta=beta)
            for loss_type, beta in (("sigmoid", 1.0), ("sppo_hard", 0.1))
        )
        loss = self.dpo_loss(dpo, batch.encoded) + self.dpo_loss(sppo, batch.encoded)
        for parameter, other in zip(dpo.model.parameters(), sppo.model.parameters(), strict=True):
            parameter.grad += other.grad
        output = METHODS["cal_dpo"]().loss(batch.logps)
        batch.ours.zero_grad()
        output.loss.mean().backward(retain_graph=True)
        torch.testing.assert_close(output.loss.mean(), loss, rtol=1e-5, atol=0)
        same_gradients(batch.ours, dpo.model)

    def cpo_trainer(self, tmp_path, tiny_chat, batch, **settings):
        arguments = CPOConfig(
            str(tmp_path), bf16=False, gradient_checkpointing=False, use_cpu=True, report_to=[], **settings
        )
        text = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
        return CPOTrainer(
            copy.deepcopy(batch.policy),
            arguments,
            train_dataset=text,
            processing_class=copy.deepcopy(tiny_chat.tokenizer),
        )

    @pytest.mark.parametrize(
        ("name", "settings"),
        [
            ("cpo", {"loss_type": "sigmoid", "cpo_alpha": 0.7, "beta": 0.1}),
            ("simpo", {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.5, "beta": 2.0}),
            ("simpo", {"loss_type": "simpo", "cpo_alpha": 0.7, "simpo_gamma": 0.5, "beta": 2.0}),
        ],
    )
    def test_losses_without_reference(self, tmp_path, tiny_chat, batch, name, settings):
        """A pair at a time, since TRL's likelihood term of CPO is a mean over the tokens of a batch."""
        trainer = self.cpo_trainer(tmp_path, tiny_chat, batch, **settings)
        likelihood = {"cpo": "cpo_alpha", "simpo": "nll_weight"}[name]  # the others are our defaults
        output = METHODS[name](**{likelihood: settings["cpo_alpha"]}).loss(batch.logps)
        for i, pair in enumerate(batch.encoded):
            rows = {}
            for side in ("chosen", "rejected"):
                ids = [*pair.prompt, *getattr(pair, side)]
                rows[f"{side}_input_ids"] = tensor([ids])
                rows[f"{side}_attention_mask"] = torch.ones(1, len(ids), dtype=torch.long)
                rows[f"{side}_labels"] = tensor([[-100] * len(pair.prompt) + getattr(pair, side)])
            trainer.model.zero_grad()
            loss, metrics = trainer.get_batch_loss_metrics(trainer.model.eval(), rows)
            loss.backward()
            batch.ours.zero_grad()
            output.loss[i].backward(retain_graph=True)
            torch.testing.assert_close(output.loss[i], loss, rtol=1e-5, atol=0)
            for metric in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
                assert output.metrics[metric][i].item() == pytest.approx(metrics[metric], rel=1e-4), metric
            if name == "cpo":
                for metric in ("nll_loss", "logps/chosen", "logps/rejected"):
                    assert output.metrics[metric][i].item() == pytest.approx(metrics[metric], rel=1e-5)
            same_gradients(batch.ours, trainer.model)

    def test_orpo(self, tmp_path, tiny_chat, batch):
        """The odds ratio; TRL's likelihood term is of the prompt too, ours of the response alone."""
        arguments = ORPOConfig(
            str(tmp_path), beta=0.3, bf16=False, gradient_checkpointing=False, use_cpu=True, report_to=[]
        )
        trainer = ORPOTrainer(
            copy.deepcopy(batch.policy),
            arguments,
            train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
            processing_class=copy.deepcopy(tiny_chat.tokenizer),
        )
        p = batch.logps
        per_token = p.policy_chosen / p.chosen_tokens, p.policy_rejected / p.rejected_tokens
        weighted_ratio, *rewards, ratio, odds = trainer.odds_ratio_loss(*per_token)
        output = METHODS["orpo"](beta=0.3).loss(p)
        torch.testing.assert_close(output.loss + per_token[0], -weighted_ratio)
        torch.testing.assert_close(output.metrics["rewards/chosen"], rewards[0])
        torch.testing.assert_close(output.metrics["rewards/rejected"], rewards[1])
        torch.testing.assert_close(output.metrics["log_odds_ratio"].mean(), ratio)
        torch.testing.assert_close(output.metrics["log_odds_chosen"].mean(), odds)

    def test_cdpo(self, tmp_path, tiny_chat, batch):
        """DPOTrainer smooths the labels of no loss but `robust`; CPOTrainer does, here of our log-ratios."""
        trainer = self.cpo_trainer(tmp_path, tiny_chat, batch, label_smoothing=0.2, beta=0.1)
        p = batch.logps
        deltas = p.policy_chosen - p.reference_chosen, p.policy_rejected - p.reference_rejected
        theirs, *rewards = trainer.cpo_loss(*deltas)
        output = METHODS["cdpo"](label_smoothing=0.2).loss(p)
        torch.testing.assert_close(output.loss, theirs)
        torch.testing.assert_close(output.metrics["rewards/chosen"], rewards[0])
        torch.testing.assert_close(output.metrics["rewards/rejected"], rewards[1])


def same_gradients(ours, theirs):
    ours = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(ours[name].grad, parameter.grad, rtol=1e-5, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method().product_keys])
@given(factor=st.floats(0.1, 10), seed=st.integers(0, 99))
def test_keys_that_count_as_their_product_train_the_same_model(name, factor, seed):
    """The weights are made anew from the mutual information, as a training makes them."""
    one = METHODS[name](alpha=1.5, beta=0.1)
    other = METHODS[name](alpha=1.5 * factor, beta=0.1 / factor)
    pairs, mi = random_pairs(seed=seed), torch.rand(2, 8, dtype=torch.float64)
    losses = []
    for method in (one, other):
        chosen, rejected = method.weights(mi[0], mi[1])
        losses.append(method.loss(replace(pairs, weight_chosen=chosen, weight_rejected=rejected)).loss)
    torch.testing.assert_close(losses[0], losses[1])


def test_settings_of_the_loss_tell_other_losses_apart():
    bdpo = METHODS["bdpo"]
    assert bdpo(alpha=1.0, beta=0.2).loss_settings() == bdpo(alpha=2.0, beta=0.1).loss_settings()
    assert bdpo(alpha=1.0, beta=0.2).loss_settings() != bdpo(alpha=2.0, beta=0.2).loss_settings()
    assert bdpo(sharpness=2.0).loss_settings() != bdpo().loss_settings()
    on_gradient = [
        bdpo(alpha=a, beta=b, balance_on="gradient").loss_settings() for a, b in ((1, 0.2), (2, 0.1))
    ]
    assert on_gradient[0] != on_gradient[1]
    assert METHODS["dpo"](beta=0.2).loss_settings()["beta"] == 0.2
