"""The learner against transformers' own forward pass, and the invariance of a step under every cut."""

import random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from retool.algo.batch import MicroBatch, Sample, micro_batches
from retool.algo.losses import ppo_clip
from retool.config import OptimConfig
from retool.engine import learner as learner_module
from retool.engine.learner import Learner, Loss, Outputs, supervised, token_logprobs

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS = [Qwen2Config(**SIZES), Qwen3Config(**SIZES, head_dim=8), LlamaConfig(**SIZES)]


def make_model(config: PreTrainedConfig) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="retool")
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.2)
    return model


def make_samples(count: int = 9, prefix: int = 20, seed: int = 0) -> list[Sample]:
    """Rows of different lengths behind a common prefix, with observations (mask 0) inside the response."""
    rng = random.Random(seed)
    shared = [rng.randrange(64) for _ in range(prefix)]
    samples = []
    for _ in range(count):
        prompt = shared + [rng.randrange(64) for _ in range(rng.randint(1, 6))]
        response = rng.randint(2, 25)
        mask = [0] * len(prompt) + [int(rng.random() < 0.7) for _ in range(response - 1)] + [1]
        ids = prompt + [rng.randrange(64) for _ in range(response)]
        samples.append(Sample(ids, mask, [-rng.random() * 5 for _ in ids], rng.uniform(-2, 2)))
    return samples


def reference_logprobs(model: Any, sample: Sample) -> list[float]:
    """Each learnt token's log-probability, by transformers' own attention on the whole sequence."""
    model.config._attn_implementation = "sdpa"
    try:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([sample.ids_T])).logits[0].log_softmax(-1)
    finally:
        model.config._attn_implementation = "retool"
    return [float(logits[t - 1, sample.ids_T[t]]) for t, m in enumerate(sample.mask_T) if m]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.model_type)
@pytest.mark.parametrize("prefix", [0, 1, 20])
def test_log_probabilities_equal_transformers(config: PreTrainedConfig, prefix: int) -> None:
    model = make_model(config)
    samples = make_samples(prefix=prefix)
    ours = [
        value for s in samples for b in micro_batches([s], 10_000) for value in token_logprobs(model, b)[0].tolist()
    ]
    together = sorted(v for b in micro_batches(samples, 10_000) for v in token_logprobs(model, b)[0].tolist())
    expected = [value for s in samples for value in reference_logprobs(model, s)]
    assert ours == pytest.approx(expected, abs=1e-4)
    assert together == pytest.approx(sorted(expected), abs=1e-4)


def test_entropy_and_temperature() -> None:
    model = make_model(CONFIGS[0])
    (batch,) = micro_batches(make_samples(count=1), 10_000)
    logprobs_N, entropy_N = token_logprobs(model, batch, temperature=2.0)
    prefix = batch.prefix_P.shape[0]
    ids = torch.cat([batch.prefix_P, batch.ids_BT[0]])[None]
    model.config._attn_implementation = "sdpa"
    logits = model(input_ids=ids).logits[0, prefix + batch.source_N] / 2.0
    distribution = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(entropy_N, distribution.entropy(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logprobs_N, distribution.log_prob(batch.target_N), atol=1e-4, rtol=1e-4)


def rl_loss(outputs: Outputs, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return ppo_clip(outputs.logprobs_N, batch.old_logprobs_N, batch.advantages_N).loss_N, {}


def gradients(samples: list[Sample], loss: Loss, micro_batch_tokens: int) -> tuple[float, torch.Tensor]:
    """Loss and gradient of one step, read off an update by plain gradient descent."""
    model = make_model(CONFIGS[0])
    before = torch.cat([p.detach().clone().flatten() for p in model.parameters()])
    learner = Learner(model, OptimConfig(lr=1.0, grad_clip=1e9), total_steps=1, micro_batch_tokens=micro_batch_tokens)
    learner.optimizers = [torch.optim.SGD(model.parameters(), lr=1.0)]
    learner.base_lrs = [[1.0]]
    result = learner.update(samples, loss)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    return result["loss"], before - after


@pytest.mark.parametrize("loss", [rl_loss, supervised])
def test_a_step_does_not_depend_on_cut_padding_or_order(loss: Loss) -> None:
    samples = make_samples()
    whole_loss, whole = gradients(samples, loss, 100_000)
    assert whole.norm() > 1e-3
    for tokens in (1, 60, 130):
        cut_loss, cut = gradients(random.Random(tokens).sample(samples, len(samples)), loss, tokens)
        assert cut_loss == pytest.approx(whole_loss, rel=1e-5)
        torch.testing.assert_close(cut, whole, atol=2e-6, rtol=1e-4)


def test_the_denominator_counts_learnt_tokens_only() -> None:
    """Longer prompts and observations change the loss only as context: with a model that ignores context (no layers),
    not at all."""
    model = make_model(Qwen2Config(**{**SIZES, "num_hidden_layers": 0}))
    learner = Learner(model, OptimConfig(), total_steps=1, micro_batch_tokens=1000)
    short = Sample([1, 2, 3], [0, 0, 1])
    long = Sample([7, 8, 9, 1, 2, 3, 5, 6], [0, 0, 0, 0, 0, 1, 0, 0])
    assert learner.evaluate_loss([short]) == pytest.approx(learner.evaluate_loss([long]), abs=1e-6)
    result = learner.update([short, long], supervised)
    assert result["tokens"] == 2


def test_tokens_with_mask_0_get_no_gradient() -> None:
    """What an observation's token is cannot change the step but as context, which a model without layers ignores."""

    def change(observation: int) -> torch.Tensor:
        model = make_model(Qwen2Config(**{**SIZES, "num_hidden_layers": 0}, tie_word_embeddings=False))
        learner = Learner(model, OptimConfig(lr=0.1), total_steps=1, micro_batch_tokens=1000)
        learner.update([Sample([1, 2, observation, 4, 5], [0, 1, 0, 0, 1], [-1.0] * 5, 1.0)], rl_loss)
        return torch.as_tensor(model.lm_head.weight.detach().clone())

    torch.testing.assert_close(change(10), change(20))


def test_large_selections_are_computed_in_chunks_with_equal_gradients() -> None:
    samples = make_samples()
    whole = gradients(samples, rl_loss, 100_000)
    normal, learner_module.MAX_LOGITS = learner_module.MAX_LOGITS, 64 * 5
    try:
        chunked = gradients(samples, rl_loss, 100_000)
    finally:
        learner_module.MAX_LOGITS = normal
    assert chunked[0] == pytest.approx(whole[0], rel=1e-5)
    torch.testing.assert_close(chunked[1], whole[1], atol=2e-6, rtol=1e-4)


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    model = make_model(CONFIGS[0])
    learner = Learner(model, OptimConfig(lr=0.1), total_steps=1, micro_batch_tokens=1000)
    before = [p.detach().clone() for p in model.parameters()]
    result = learner.update([Sample([1, 2], [0, 1], [0.0, 0.0], float("nan"))], rl_loss)
    assert result["skipped"] == 1
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, old)


def test_learning_rate_and_state_survive_a_restart() -> None:
    samples = make_samples()

    def trained(steps: list[int]) -> torch.Tensor:
        """Train in stretches, each with a new learner that takes up the state of the one before."""
        model = make_model(CONFIGS[0])
        state = None
        for stretch in steps:
            config = OptimConfig(name="muon", lr=1e-2, warmup_steps=2, schedule="linear")
            learner = Learner(model, config, total_steps=6, micro_batch_tokens=200)
            if state is not None:
                learner.load_state_dict(state)
            for _ in range(stretch):
                learner.update(samples, supervised)
            state = learner.state_dict()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(trained([6]), trained([2, 3, 1]))
