"""Every recipe that names a cluster composes into verl's configuration, without a GPU, and the 32B ones into the
reference's values (``reference.py``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from retool.cluster.main import compose
from retool.cluster.option import CONFIGS, Job
from retool.cluster.options import overrides_of
from retool.config import SHIPPED_RECIPES, load_recipe
from retool.errors import ConfigError

pytest.importorskip("verl.trainer")

from omegaconf import OmegaConf
from reference import (
    DEFAULTS_GRPO,
    DEFAULTS_PPO,
    DEFAULTS_SFT,
    LAUNCH_SFT,
    RECIPE_DAPO,
    REFERENCE_DAPO,
    REFERENCE_GRPO,
    REFERENCE_PPO,
    REFERENCE_SFT,
)

REFERENCE: dict[str, dict[str, Any]] = {
    "sft": REFERENCE_SFT | DEFAULTS_SFT,
    "grpo": REFERENCE_GRPO | DEFAULTS_GRPO,
    "ppo": REFERENCE_PPO | DEFAULTS_PPO,
    "dapo": REFERENCE_DAPO,
}
SHIPPED = sorted(path.relative_to(SHIPPED_RECIPES) for path in SHIPPED_RECIPES.rglob("*.toml"))


def composed(recipe_path: Path, *overrides: str, extra: tuple[str, ...] = ()) -> Any:
    recipe = load_recipe(SHIPPED_RECIPES / recipe_path, overrides)
    name = "sft" if recipe_path.stem == "sft" else "rl"
    return compose(overrides_of(Job(name, recipe, Path("/runs/x")), extra), CONFIGS[name])


@pytest.fixture(autouse=True)
def _no_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RETOOL_START", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.mark.parametrize("path", [path for path in SHIPPED if len(path.parts) > 1], ids=str)
def test_a_recipe_composes(path: Path) -> None:
    config = composed(path)
    recipe = load_recipe(SHIPPED_RECIPES / path)
    assert config.trainer.experiment_name == recipe.run.name
    assert config.trainer.n_gpus_per_node == recipe.cluster.gpus_per_node


@pytest.mark.parametrize("name", sorted(REFERENCE))
def test_the_reference_line_by_line(name: str) -> None:
    config = composed(Path("qwen2.5-32b") / f"{name}.toml")
    found = {key: OmegaConf.select(config, key, default="missing") for key in REFERENCE[name]}
    found = {key: OmegaConf.to_object(value) if OmegaConf.is_list(value) else value for key, value in found.items()}
    assert found == REFERENCE[name]


def test_the_sft_is_started_on_as_many_gpus() -> None:
    config = composed(Path("qwen2.5-32b/sft.toml"))
    assert {"nnodes": config.trainer.nnodes, "nproc_per_node": config.trainer.n_gpus_per_node} == LAUNCH_SFT


def test_the_punishment_of_length_is_our_own() -> None:
    recipe = load_recipe(SHIPPED_RECIPES / "qwen2.5-32b/dapo.toml")
    fields = {f"rl.overlong.{name}": value for name, value in recipe.rl.overlong.model_dump().items()}
    assert fields == RECIPE_DAPO


@pytest.mark.parametrize("algorithm", ["grpo", "dapo", "dr_grpo", "gspo", "cispo", "rloo", "reinforce_pp", "ppo"])
def test_an_algorithm_is_what_verl_builds(algorithm: str) -> None:
    """verl's own data classes take the values, and name the estimator and the loss that its registry has."""
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    overrides = (
        f"rl.algorithm={algorithm}",
        "rl.kl.place=loss",
        "model.path=nano",
    )  # a critic's config reads the model's
    config = composed(Path("qwen2.5-7b/grpo.toml"), *overrides)
    critic = need_critic(config)
    validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=critic)
    assert critic == (algorithm == "ppo") and need_reference_policy(config)
    estimator = config.algorithm.adv_estimator
    assert estimator == "gae" or get_adv_estimator_fn(estimator)
    assert get_policy_loss_fn(config.actor_rollout_ref.actor.policy_loss.loss_mode)


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ("trainer.no_such_option=1", "no_such_option"),
        ("actor_rollout_ref.rollout.n=4", "give rl.group_size"),
        ("trainer.balance_batch", "write key=value"),
    ],
)
def test_an_option_that_does_not_fit_is_one_line(extra: str, told: str) -> None:
    with pytest.raises(ConfigError) as error:
        composed(Path("qwen2.5-7b/grpo.toml"), extra=(extra,))
    assert told in str(error.value) and "\n" not in str(error.value)
