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
from trl.trainer.dpo_trainer import DataCollatorForPreference

from bdpo.method.base import PairLogps
from bdpo.method.losses import METHODS
from bdpo.models.logps import LogpsModel, pair_logps
from tests.support.helpers import encoded_pairs, tiny_qwen2

FIELDS = list(PairLogps.__dataclass_fields__)

WITHOUT_REFERENCE = [name for name, method in METHODS.items() if not method.requires_reference]

WITH_REFERENCE = [name for name in METHODS if name not in [*WITHOUT_REFERENCE, "safedpo"]]

UNSAFE = [(False, False), (False, True), (True, False), (True, True)]  # chosen, rejected


def random_pairs(pairs=8, seed=0):
    """Log-probs about a few nats apart; every combination of safety labels."""
    generator = torch.Generator().manual_seed(seed)
    columns = {name: torch.randn(pairs, generator=generator, dtype=torch.float64) for name in FIELDS}
    for name in ("weight_chosen", "weight_rejected"):
        columns[name] = columns[name].abs()
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


FORMULAS = {
    "dpo": weighted(lambda a, m: 1.0),
    "bdpo": weighted(lambda a, m: a),
    "dpo_bw": weighted(lambda a, m: a),
    "dpo_sf": weighted(lambda a, m: m.alpha / 2),
} | {formula.__name__: formula for formula in (dpop, ipo, cdpo, robust, cpo, simpo, safedpo, sft)}


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
    "safedpo_delta": 3.0,
}


@pytest.mark.parametrize("name", METHODS)
def test_formula(name):
    method = METHODS[name](**{key: value for key, value in KEYS.items() if key in METHODS[name].model_fields})
    pairs = random_pairs()
    loss = method.loss(pairs).loss
    assert loss.shape == (8,)
    assert loss.tolist() == pytest.approx([FORMULAS[name](scalars(pairs, i), method) for i in range(8)])


CHANGED = KEYS | {"balance": "softmax", "sharpness": 3.0, "mi_floor": 0.5, "min_share": 0.4}


@pytest.mark.parametrize(("name", "key"), [(n, k) for n, m in METHODS.items() for k in m.model_fields])
def test_every_key_of_a_method_changes_its_loss(name, key):
    """Of pairs whose weights are the method's own."""
    generator = torch.Generator().manual_seed(1)
    mi = [torch.rand(8, generator=generator, dtype=torch.float64) for _ in range(2)]

    def loss(method):
        weights = dict(zip(("weight_chosen", "weight_rejected"), method.weights(*mi), strict=True))
        return method.loss(replace(random_pairs(), **weights)).loss

    if key != "name" and (name, key) != ("sft", "beta"):  # which is of the logged rewards alone
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


@pytest.mark.parametrize("name", METHODS)
def test_metrics_require_no_gradient(name):
    """They are summed over micro-batches: with a graph each would keep its activations alive."""
    pairs = random_pairs()
    pairs = replace(pairs, policy_chosen=pairs.policy_chosen.requires_grad_())
    output = METHODS[name]().loss(pairs)
    assert output.loss.requires_grad
    assert not [metric for metric, values in output.metrics.items() if values.requires_grad]


def test_equal_rewards_are_not_accurate():
    assert METHODS["dpo"]().loss(pairs_of()).metrics["rewards/accuracies"] == 0


def test_balance_margins_are_what_bdpo_trains():
    pairs, method = random_pairs(), METHODS["bdpo"](beta=0.3)
    output = method.loss(pairs)
    assert [nll_of_sigmoid(m.item()) for m in output.metrics["balance/margins"]] == pytest.approx(
        output.loss.tolist()
    )


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


@pytest.mark.parametrize("name", ["bdpo", "dpo", "dpo_bw", "dpo_sf", "dpop", "cdpo", "robust"])
def test_before_training_the_loss_is_ln_2_whatever_the_weights(name):
    pairs = random_pairs()
    pairs = replace(pairs, policy_chosen=pairs.reference_chosen, policy_rejected=pairs.reference_rejected)
    expected = torch.full((8,), math.log(2), dtype=torch.float64)
    torch.testing.assert_close(METHODS[name]().loss(pairs).loss, expected)


@pytest.mark.parametrize("name", WITHOUT_REFERENCE)
def test_a_loss_without_reference_looks_at_no_score(name):
    pairs, method = random_pairs(), METHODS[name]()
    unknown = torch.full((8,), math.nan)
    scored = ("reference_chosen", "reference_rejected", "weight_chosen", "weight_rejected")
    unscored = method.loss(replace(pairs, **dict.fromkeys(scored, unknown)))
    scored = method.loss(pairs)
    assert torch.equal(unscored.loss, scored.loss)
    assert all(torch.equal(unscored.metrics[key], value) for key, value in scored.metrics.items())


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
        sides = pair_logps(LogpsModel(model, max_length=128), pairs)
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

    @pytest.mark.parametrize(
        ("name", "loss_type"), [("dpo", "sigmoid"), ("ipo", "ipo"), ("robust", "robust")]
    )
    def test_loss_rewards_and_gradients(self, tmp_path, tiny_chat, batch, name, loss_type):
        rows = [{f"{part}_ids": ids for part, ids in vars(pair).items()} for pair in batch.encoded]
        arguments = DPOConfig(
            str(tmp_path),
            loss_type=loss_type,
            beta=0.1,
            label_smoothing=0.2,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            report_to=[],
        )
        text = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
        trainer = DPOTrainer(
            copy.deepcopy(batch.policy),
            batch.reference,
            arguments,
            train_dataset=text,
            processing_class=copy.deepcopy(tiny_chat.tokenizer),  # TRL gives it a padding token
        )
        loss = trainer.compute_loss(trainer.model.train(), DataCollatorForPreference(pad_token_id=0)(rows))
        loss.backward()

        output = METHODS[name](**{"label_smoothing": 0.2} if name == "robust" else {}).loss(batch.logps)
        batch.ours.zero_grad()
        output.loss.mean().backward(retain_graph=True)
        torch.testing.assert_close(output.loss.mean(), loss.squeeze(), rtol=1e-5, atol=0)
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
        ],
    )
    def test_losses_without_reference(self, tmp_path, tiny_chat, batch, name, settings):
        """A pair at a time, since TRL's likelihood term of CPO is a mean over the tokens of a batch."""
        trainer = self.cpo_trainer(tmp_path, tiny_chat, batch, **settings)
        keys = {"cpo": {"cpo_alpha": 0.7}, "simpo": {}}[name]  # SimPO's are our defaults
        output = METHODS[name](**keys).loss(batch.logps)
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


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.product_keys])
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
    assert METHODS["dpo"](beta=0.2).loss_settings()["beta"] == 0.2
