"""How a batch changes the weights: every loss under every cut, PPO's critic, KL, off-policy weights."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

import pytest
import torch

from retool.algo.advantages import gae, whiten
from retool.algo.batch import Sample, loss_shares, micro_batches
from retool.algo.losses import value_loss
from retool.config import LoraConfig, RLConfig, make_recipe
from retool.engine.critic import Critic, token_values
from retool.engine.learner import Learner, policy_forward
from retool.engine.lora import add_lora
from retool.errors import ConfigError
from retool.types import Finish, StopReason, Task, TokenOutput, Trajectory, TrajectoryGroup, Turn
from retool.update import Trainer, policy_loss
from tests.engine.test_learner import CONFIGS, make_model, make_samples

TASK = Task("t", "s", [], "1")


def full_samples(count: int = 9) -> list[Sample]:
    """Samples with everything that a loss may ask for; advantages of a sequence are equal, as group methods make
    them."""
    rng = random.Random(5)
    filled = []
    for s in make_samples(count):
        n = s.learnt
        filled.append(
            Sample(
                s.ids_T, s.mask_T, [-rng.random() * 3 for _ in s.ids_T], rng.choice([-1.3, -0.2, 0.8, 1.5]),
                weights_N=[rng.uniform(0.2, 2) for _ in range(n)], ref_logprobs_N=[-rng.random() * 3 for _ in range(n)],
                values_N=[rng.uniform(-1, 1) for _ in range(n)], returns_N=[rng.uniform(-1, 1) for _ in range(n)],
            )
        )  # fmt: skip
    return filled


def flat_gradient(model: Any) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def step_of(model: Any, loss: Any, forward: Any, samples: list[Sample], tokens: int, **how: Any) -> tuple[float, Any]:
    """Loss and gradient of one step, in whatever pieces."""
    learner = Learner(
        model, RLConfig().optim, total_steps=1, micro_batch_tokens=tokens, forward=forward
    )  # fmt: skip
    found: dict[str, Any] = {}

    def keep_gradient() -> dict[str, float]:
        found["gradient"] = flat_gradient(model)
        model.zero_grad()
        return {}

    learner._apply = keep_gradient  # type: ignore[method-assign]
    return learner.update(samples, loss, **how)["loss"], found["gradient"]


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
@pytest.mark.parametrize(
    "config",
    [
        {"loss": "ppo_clip"},
        {"loss": "gspo", "clip_low": 0.3, "clip_high": 0.3},
        {"loss": "cispo", "clip_low": 1.0, "clip_high": 1.0},
        *({"kl": {"place": "loss", "coef": 0.3, "estimator": k}} for k in ("k1", "k2", "k3")),
        {"entropy_bonus": 0.2},
    ],
    ids=lambda c: "-".join(map(str, c.values())) if len(c) < 3 else str(c["loss"]),
)
def test_every_loss_is_the_same_under_every_cut(config: dict[str, Any], aggregation: str) -> None:
    """Micro-batches, padding, order and packing change neither loss nor gradient (≤ 1e-6 relative, fp32)."""
    rl = RLConfig.model_validate(config)
    forward = policy_forward(1.0, entropy_gradient=rl.entropy_bonus > 0)
    model, samples = make_model(CONFIGS[0]), full_samples()
    how = {"aggregation": aggregation, "max_tokens": 40}
    whole_loss, whole = step_of(model, policy_loss(rl), forward, samples, 100_000, **how)
    assert whole.norm() > 1e-3
    for tokens in (1, 60, 130):
        shuffled = random.Random(tokens).sample(samples, len(samples))
        loss, gradient = step_of(model, policy_loss(rl), forward, shuffled, tokens, **how)
        assert loss == pytest.approx(whole_loss, rel=1e-6)
        assert float((gradient - whole).norm() / whole.norm()) <= 1e-6


def test_the_value_loss_is_the_same_under_every_cut() -> None:
    critic, samples = Critic(make_model(CONFIGS[0])), full_samples()
    torch.nn.init.normal_(critic.value_head.weight)

    def loss(values_N: torch.Tensor, batch: Any) -> Any:
        return value_loss(values_N, batch.values_N, batch.returns_N, clip=0.5)[0], {}

    whole_loss, whole = step_of(critic, loss, token_values, samples, 100_000)
    for tokens in (1, 60):
        cut_loss, cut = step_of(critic, loss, token_values, list(reversed(samples)), tokens)
        assert cut_loss == pytest.approx(whole_loss, rel=1e-6)
        assert float((cut - whole).norm() / whole.norm()) <= 1e-6


def test_shares_worked_by_hand() -> None:
    """Two sequences of 1 and 3 learnt tokens. token_mean: ¼ each. sequence_mean: ½ and ⅙. constant, 10 tokens and 4
    sequences in all: 1/40."""
    samples = [Sample([1, 2], [0, 1]), Sample([1, 2, 3, 4], [0, 1, 1, 1])]
    assert loss_shares(samples, "token_mean") == [1 / 4, 1 / 4]
    assert loss_shares(samples, "sequence_mean") == [1 / 2, 1 / 6]
    assert loss_shares(samples, "constant", sequences=4, max_tokens=10) == [1 / 40, 1 / 40]
    with pytest.raises(ValueError, match="mean"):
        loss_shares(samples, "mean")


# --- whole steps ------------------------------------------------------------------------------------------------------


def trajectory(sample: int, reward: float, *, stop: StopReason = StopReason.ANSWERED, version: int = 0) -> Trajectory:
    rng, n = random.Random(sample), 2 + sample
    turns = [
        Turn(TokenOutput([rng.randrange(64) for _ in range(4)], [-2.0] * 4, Finish.STOP, version),
             observation_ids=[20, 21, 22]),
        Turn(TokenOutput([rng.randrange(64) for _ in range(n)], [-2.0] * n, Finish.STOP, version + 1)),
    ]  # fmt: skip
    return Trajectory(TASK, sample, [1, 2, 3], turns, stop, reward)


def group(*rewards: float) -> TrajectoryGroup:
    return TrajectoryGroup(TASK, [trajectory(i, r) for i, r in enumerate(rewards)])


def trainer(model: Any, **rl: Any) -> Trainer:
    settings: dict[str, Any] = {"prompts": 1, "steps": 4, "optim": {"lr": 1e-3}}
    return Trainer(model, make_recipe({"rl": settings | rl}))


def test_gae_jumps_over_observations_and_pays_at_the_last_token() -> None:
    """The trainer's advantages are those of ``gae`` on the sampled tokens' values, whitened over the batch."""
    t = trainer(make_model(CONFIGS[0]), algorithm="ppo", critic={"gamma": 0.9, "lam": 0.7, "optim": {"lr": 1e-2}})
    assert t.critic is not None
    torch.nn.init.normal_(t.critic.model.value_head.weight, std=0.3)
    g = group(1.0, -1.0, 0.5)
    samples = [Sample(x.ids_T, x.mask_T, x.logprobs_T) for x in g.trajectories]
    values = t.critic.evaluate(samples, lambda v: v)
    assert [len(v) for v in values] == [6, 7, 8]
    expected = []
    for x, v in zip(g.trajectories, values, strict=True):
        rewards = torch.zeros(len(v), dtype=torch.float64)
        rewards[-1] = x.reward
        expected.append(gae(rewards, torch.tensor(v, dtype=torch.float64), 0.9, 0.7)[0])
    expected_N = whiten(torch.cat(expected))
    metrics = t.step([g], 0, 1)
    found = [x.advantage for x in g.trajectories]
    assert found == pytest.approx([float(part.mean()) for part in expected_N.split([6, 7, 8])], abs=1e-6)
    assert metrics["critic/updates"] == metrics["actor/updates"] == 1
    assert metrics["critic/vf_explained_var"] < 1


def test_the_critic_learns_the_returns() -> None:
    """With γ = λ = 1 and one outcome a trajectory, values come near the outcomes, and explain their variance."""
    t = trainer(make_model(CONFIGS[0]), algorithm="ppo", steps=80, critic={"warmup_steps": 79, "optim": {"lr": 3e-3}})
    before = [p.detach().clone() for p in t.actor.model.parameters()]
    explained = [t.step([group(1.0, -1.0, 1.0, -1.0)], step, 0)["critic/vf_explained_var"] for step in range(60)]
    assert explained[0] == pytest.approx(0, abs=1e-6)  # a new critic says 0 everywhere
    assert explained[-1] > 0.6  # a first token's value cannot know how its trajectory will end
    assert all(torch.equal(p, old) for p, old in zip(t.actor.model.parameters(), before, strict=True)), "warm-up"


def test_scaling_returns_moves_no_value() -> None:
    critic = Critic(make_model(CONFIGS[0]))
    torch.nn.init.normal_(critic.value_head.weight)
    (batch,) = micro_batches(make_samples(1), 1000)
    before = token_values(critic, batch)
    critic.update_scale(torch.zeros(50))
    for _ in range(3):
        critic.update_scale(torch.randn(50) * 4 + 10)
    assert float(critic.std) > 2
    assert float(critic.mean) > 4
    torch.testing.assert_close(token_values(critic, batch), before, atol=1e-4, rtol=1e-4)


def test_returns_may_be_whitened() -> None:
    t = trainer(make_model(CONFIGS[0]), algorithm="ppo", steps=90, critic={"whiten_returns": True, "warmup_steps": 89,
                "optim": {"lr": 3e-3}})  # fmt: skip
    rewards = [11.0, 9.0, 12.0, 8.0]
    explained = [t.step([group(*rewards)], step, 0)["critic/vf_explained_var"] for step in range(70)]
    assert explained[-1] > 0.6


@pytest.mark.parametrize("place", ["loss", "reward"])
def test_kl_to_the_reference_is_zero_at_first_and_grows(place: str) -> None:
    t = trainer(make_model(CONFIGS[0]), kl={"place": place, "coef": 0.01}, optim={"lr": 1e-2})
    g = group(1.0, -1.0)
    for x in g.trajectories:  # on-policy: the old log-probabilities are the model's own
        own = t.actor.evaluate([Sample(x.ids_T, x.mask_T, x.logprobs_T)], lambda o: o.logprobs_N)[0]
        for turn in x.turns:
            turn.output.logprobs[:] = [own.pop(0) for _ in turn.output.logprobs]
        del x.__dict__["logprobs_T"]
    first = t.step([g], 0, 0)
    assert first["actor/reference_kl"] == pytest.approx(0, abs=1e-6)
    assert first.get("actor/kl_loss", 0.0) == pytest.approx(0, abs=1e-6)
    second = t.step([g], 1, 1)
    if place == "loss":
        assert second["actor/kl_loss"] > 1e-4
    else:
        assert "actor/kl_loss" not in second


def test_kl_in_the_reward_lowers_the_score_by_its_sum() -> None:
    """The actor is moved away from its reference; k2 of each token is summed and taken off the reward."""
    model = make_model(CONFIGS[0])
    reference = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight.add_(torch.randn_like(model.lm_head.weight) * 0.1)
    t = Trainer(
        model, make_recipe({"rl": {"prompts": 1, "advantage": "dr_grpo", "kl": {"place": "reward", "coef": 0.5,
        "estimator": "k2"}}}), reference=reference,
    )  # fmt: skip
    g = group(1.0, 1.0)
    samples = [Sample(x.ids_T, x.mask_T, x.logprobs_T) for x in g.trajectories]
    t.actor.model = reference
    ref = t.actor.evaluate(samples, lambda o: o.logprobs_N)
    t.actor.model = model
    penalties = [0.5 * sum((-2.0 - r) ** 2 / 2 for r in row) for row in ref]
    t.step([g], 0, 0)
    mean = sum(1 - p for p in penalties) / 2
    assert [x.advantage for x in g.trajectories] == pytest.approx([1 - p - mean for p in penalties], rel=1e-4)


def test_correction_takes_the_learners_own_log_probabilities_as_the_old_ones() -> None:
    """The sampler's were −2 everywhere: weights make up for the difference, and the first ratio is 1."""
    t = trainer(make_model(CONFIGS[0]), correction={"level": "token", "high": 2.0})
    g = group(1.0, -1.0)
    for x in g.trajectories:
        for turn in x.turns:
            turn.output.logprobs[:] = [-9.0] * len(turn.output.logprobs)
    own = t.actor.evaluate([Sample(x.ids_T, x.mask_T, x.logprobs_T) for x in g.trajectories], lambda o: o.logprobs_N)
    weights = [min(2.0, math.exp(value + 9)) for row in own for value in row]
    metrics = t.step([g], 0, 3)
    assert metrics["training/rollout_is_weight_mean"] == pytest.approx(sum(weights) / len(weights), rel=1e-4)
    assert metrics["training/rollout_is_bounded_share"] == sum(w == 2.0 for w in weights) / len(weights)
    assert metrics["actor/ppo_kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["training/rollout_logprob_gap_max"] > 0.1
    assert metrics["training/staleness_max"] == 3  # the oldest turn was sampled by version 0


def test_overlong_trajectories_stay_in_their_groups_mean_and_are_not_learnt_from() -> None:
    g = group(1.0, -1.0, -1.0)
    g.trajectories[2].stop_reason = StopReason.MAX_TOKENS
    t = trainer(make_model(CONFIGS[0]), advantage="dr_grpo", overlong={"filter": True})
    metrics = t.step([g], 0, 0)
    assert g.trajectories[0].advantage == pytest.approx(4 / 3)
    assert g.trajectories[2].advantage is None
    assert metrics["tokens/learnt"] == 6 + 7


def test_a_trainers_state_is_taken_up_bit_by_bit() -> None:
    def run(cut: int | None) -> torch.Tensor:
        config = {"algorithm": "ppo", "critic": {"whiten_returns": True, "optim": {"lr": 1e-2}}}
        t = trainer(make_model(CONFIGS[0]), **config)
        for step in range(4):
            if step == cut:
                state = copy.deepcopy(t.state_dict())
                fresh = make_model(CONFIGS[0])
                fresh.load_state_dict(t.actor.model.state_dict())
                t = trainer(fresh, **config)
                t.load_state_dict(state)
            t.step([group(1.0, -1.0, 0.3)], step, 0)
        assert t.critic is not None
        return torch.cat([p.detach().flatten() for m in (t.actor.model, t.critic.model) for p in m.parameters()])

    assert torch.equal(run(None), run(2))


def test_bf16_weights_learn_at_a_small_rate() -> None:
    """A step of 1e-6 is lost in bf16's eight bits; fp32 masters add up until it shows."""
    model = make_model(CONFIGS[0]).to(torch.bfloat16)
    before = torch.cat([p.detach().float().flatten() for p in model.parameters()])
    t = trainer(model, steps=200, optim={"lr": 1e-6})
    for step in range(3):
        t.step([group(1.0, -1.0)], step, 0)
    masters = torch.cat([m.detach().flatten() for _, m in t.actor.masters.pairs])
    moved = (masters - before).abs()
    assert 0.5e-6 < float(moved.max()) < 10e-6
    assert float((moved > 0).float().mean()) > 0.5
    after = torch.cat([p.detach().float().flatten() for p in model.parameters()])
    assert torch.equal(after, masters.to(torch.bfloat16).float())


def test_ppo_with_adapters_trains_adapters_only() -> None:
    model = make_model(CONFIGS[0])
    add_lora(model, LoraConfig(rank=2), seed=0)
    base = {name: p.detach().clone() for name, p in model.named_parameters() if "lora" not in name}
    t = trainer(model, algorithm="ppo", critic={"optim": {"lr": 1e-2}}, optim={"lr": 1e-2}, kl={"place": "reward"})
    assert t.critic is not None
    before = {name: p.detach().clone() for name, p in t.critic.model.named_parameters()}
    for step in range(2):
        t.step([group(1.0, -1.0)], step, step)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], p) for name, p in base.items())
    moved = {name for name, p in t.critic.model.named_parameters() if not torch.equal(p, before[name])}
    assert "value_head.weight" in moved
    assert all("lora" in name or "value_head" in name for name in moved)
    assert t.reference is None, "the base with its adapters off is the reference"


def test_the_schedule_ends_where_the_run_ends_whatever_was_learnt() -> None:
    """Linear to 0.1 over 4 steps of 2 mini-batches; only the first of each has something to teach."""
    t = trainer(
        make_model(CONFIGS[0]), prompts=2, minibatch_prompts=1,
        optim={"lr": 1.0, "schedule": "linear", "final_lr_share": 0.1},
    )  # fmt: skip
    rates = [t.step([group(1.0, -1.0), group(1.0, 1.0)], step, 0)["actor/lr"] for step in range(4)]
    assert rates == pytest.approx([0.1 + 0.9 * (1 - done / 8) for done in (0, 2, 4, 6)])


def test_a_first_scale_makes_a_new_head_say_the_mean() -> None:
    critic = Critic(make_model(CONFIGS[0]))
    critic.update_scale(torch.tensor([-1.0, -1.0, -1.0, -0.9]))
    (batch,) = micro_batches(make_samples(1), 1000)
    assert token_values(critic, batch).tolist() == pytest.approx([-0.975] * len(batch.target_N))


def test_dropout_is_refused() -> None:
    recipe = make_recipe({"model": {"lora": {"rank": 2, "dropout": 0.1}}})
    with pytest.raises(ConfigError, match=r"model\.lora\.dropout = 0\.1"):
        Trainer(make_model(CONFIGS[0]), recipe)


def test_trajectories_without_a_sampled_token_teach_nothing() -> None:
    silent = Trajectory(TASK, 0, [1, 2, 3], [], StopReason.CONTEXT_FULL, -1.0)
    for settings in ({"algorithm": "ppo", "critic": {"whiten_returns": True}}, {"correction": {"level": "token"}},
                     {"algorithm": "reinforce_pp"}):  # fmt: skip
        t = trainer(make_model(CONFIGS[0]), **settings)
        assert t.step([TrajectoryGroup(TASK, [silent])], 0, 0)["actor/updates"] == 0


@pytest.mark.parametrize("settings", [{}, {"algorithm": "ppo"}, {"correction": {"level": "token"}},
                                      {"kl": {"place": "loss"}}])  # fmt: skip
def test_a_step_in_which_everything_was_lost_changes_nothing(settings: dict[str, Any]) -> None:
    t = trainer(make_model(CONFIGS[0]), **settings)
    assert t.step([TrajectoryGroup(TASK, [])], 0, 0) == {"actor/updates": 0.0, "actor/skipped": 0}
