"""A recipe as verl's options, without verl: what each field becomes, what is refused, how a value is written."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retool.cluster.option import JOBS, Job, Option, hydra_value, model_path
from retool.cluster.options import REFUSED, TABLES, command_of, describe, options_of, overrides_of
from retool.cluster.refusals import notes_of
from retool.config import ALGORITHMS, SHIPPED_RECIPES, Recipe, apply_override, load_recipe, make_recipe, recipe_toml
from retool.config.section import Section
from retool.errors import ConfigError

FOLDER = Path("/runs/mine")
SHIPPED = sorted(
    path.relative_to(SHIPPED_RECIPES).with_suffix("").as_posix() for path in SHIPPED_RECIPES.rglob("*.toml")
)
ACTOR, ROLLOUT, REF = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.ref"
IS = "algorithm.rollout_correction.rollout_is"


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RETOOL_START", "RETOOL_DATA", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


def recipe_of(*overrides: str, algorithm: str = "grpo") -> Recipe:
    tree: dict[str, Any] = {"rl": {"algorithm": algorithm}}
    for override in overrides:
        apply_override(tree, override)
    return make_recipe(tree)


def values(recipe: Recipe, name: str = "rl", extra: tuple[str, ...] = ()) -> dict[str, Any]:
    """verl's options as Hydra would read them."""
    pairs = [override.partition("=") for override in overrides_of(Job(name, recipe, FOLDER), extra)]
    return {key: read(value) for key, _, value in pairs}


# --- Hydra's grammar, by hand -----------------------------------------------------------------------------------------

QUOTED = re.compile(r"'((?:\\\\)*|.*?[^\\](?:\\\\)*)'", re.DOTALL)
INT = re.compile(r"[+-]?(?:0|[1-9](?:_?\d)*)", re.ASCII)
FLOAT = re.compile(
    r"[+-]?(?:(?:0|[1-9](?:_?\d)*)?\.\d(?:_?\d)*|(?:0|[1-9](?:_?\d)*)\.|inf|nan|"
    r"(?:(?:0|[1-9](?:_?\d)*)?\.\d(?:_?\d)*|(?:0|[1-9](?:_?\d)*)\.?)e[+-]?\d(?:_?\d)*)",
    re.ASCII | re.IGNORECASE,
)
UNQUOTED = re.compile(r"[\w/\-\\+.$%*@?|:]+", re.ASCII)


def read(text: str) -> Any:
    """A value of an override, as the part of Hydra 1.3's grammar (OverrideLexer.g4) that ``hydra_value`` may write."""
    value, rest = _read(text)
    assert not rest, f"{text!r}: {rest!r} is left"
    return value


def _read(text: str) -> tuple[Any, str]:
    if text.startswith("["):
        items, rest = list[Any](), text[1:]
        while not rest.startswith("]"):
            item, rest = _read(rest.removeprefix(",") if items else rest)
            items.append(item)
        return items, rest[1:]
    if match := QUOTED.match(text):
        # backslashes mean something before a quote alone, the closing one included
        plain = re.sub(r"(\\+)('|\Z)", lambda found: "\\" * (len(found[1]) // 2) + found[2], match[1])
        return plain, text[match.end() :]
    match = UNQUOTED.match(text)
    assert match, f"{text!r}: Hydra's lexer takes no such character"
    return _primitive(match[0]), text[match.end() :]


def _primitive(word: str) -> Any:
    if word.lower() in ("null", "true", "false"):
        return {"null": None, "true": True, "false": False}[word.lower()]
    if INT.fullmatch(word):
        return int(word)
    return float(word) if FLOAT.fullmatch(word) else word


def _hydra() -> Callable[[str], Any] | None:
    try:
        from hydra.core.override_parser.overrides_parser import OverridesParser
    except ImportError:
        return None
    parser = OverridesParser.create()
    return lambda text: parser.parse_override(f"key={text}").value()


READERS = [pytest.param(read, id="by hand")]
if (_real := _hydra()) is not None:
    READERS.append(pytest.param(_real, id="hydra"))
readers = pytest.mark.parametrize("reader", READERS)


def same_value(found: Any, expected: Any) -> bool:
    """Equal, and of one type: 1 is not true, and "2" is not 2."""
    if isinstance(expected, list):
        return isinstance(found, list) and len(found) == len(expected) and all(map(same_value, found, expected))
    return type(found) is type(expected) and found == expected


@readers
@pytest.mark.parametrize(
    "value",
    [None, True, False, 0, -1, 16384, 1e-06, 2.5e-08, 1e16, 0.1, 1.0, "", "a", "a b", "a,b", "[x]", "{x: y}", "x=y",
     "it's", "'", "''", '"q"', "it\\'s", "\\'", "\\\\'", "ends\\", "ends \\\\", " lead and trail ", "a\tb", "a\nb", "#",
     "~x", "a/b.c:d-e_f", "-x", "007", "2026-11-26", "${oc.env:HOME}", "(f)", "über uns",
     [], [1, 2.5], ["a", "b c"], ["it's", None, True, "]"], [["a"], []]],
    ids=repr,
)  # fmt: skip
def test_a_value_is_read_back(reader: Callable[[str], Any], value: Any) -> None:
    assert same_value(reader(hydra_value(value)), value)


def test_a_pair_is_a_list() -> None:
    assert hydra_value((0.9, 0.999)) == "[0.9,0.999]"


@readers
@pytest.mark.parametrize("word", ["2026", "true", "Null", "1e5", "1_000", ".5", "0.5_2", "inf", "NaN"])
def test_a_word_that_looks_like_a_number_stays_a_word(reader: Callable[[str], Any], word: str) -> None:
    assert same_value(reader(hydra_value(word)), word)


@readers
@pytest.mark.parametrize("word", ["über", "数学/grpo", "run\N{ARABIC-INDIC DIGIT ONE}"])
def test_letters_of_other_alphabets(reader: Callable[[str], Any], word: str) -> None:
    try:
        found = reader(hydra_value(word))
    except Exception as error:  # Hydra's own, or ours
        raise AssertionError(str(error)) from None
    assert found == word


@readers
@pytest.mark.parametrize("text", ["a\\b", "\\\\server\\share x", "\\d+ 'x'"])
def test_backslashes_in_the_middle(reader: Callable[[str], Any], text: str) -> None:
    assert reader(hydra_value(text)) == text


@readers
@given(text=st.text(alphabet=" '\",[]{}=:~#$()ab1.é\n\t"))
def test_any_text_with_a_blank_is_read_back(reader: Callable[[str], Any], text: str) -> None:
    assert reader(hydra_value(" " + text)) == " " + text


@readers
@given(value=st.one_of(st.integers(), st.floats(allow_nan=False), st.booleans(), st.none()))
def test_any_number_is_read_back(reader: Callable[[str], Any], value: Any) -> None:
    assert same_value(reader(hydra_value(value)), value)


# --- the tables -------------------------------------------------------------------------------------------------------


def setting(tree: Any, field: str) -> Any:
    for part in field.split("."):
        tree = getattr(tree, part)
    return tree


@pytest.mark.parametrize("name", JOBS)
def test_every_field_exists_and_is_a_setting(name: str) -> None:
    for field in [option.field for option in TABLES[name] if option.field] + [field for field, _, _ in REFUSED[name]]:
        model: Any = Recipe
        for part in field.split("."):
            assert part in model.model_fields, field
            model = model.model_fields[part].annotation
        assert not (isinstance(model, type) and issubclass(model, Section)), f"{field} is a section"


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_option_is_given_twice(name: str, algorithm: str) -> None:
    recipe = recipe_of("rl.kl.place=loss", "model.lora.rank=0" if name == "sft" else "model.lora.rank=8",
                       algorithm=algorithm)  # fmt: skip
    keys = Counter(option.key.lstrip("+") for option, _ in options_of(Job(name, recipe, FOLDER)))
    assert keys.most_common(1)[0][1] == 1


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("path", SHIPPED)
def test_a_shipped_recipe_gives_its_options_or_says_why_not(path: str, name: str) -> None:
    recipe = load_recipe(SHIPPED_RECIPES / f"{path}.toml")
    job = Job(name, recipe, FOLDER)
    try:
        found = overrides_of(job)
    except ConfigError as error:
        field, equals, rest = str(error).partition(" = ")
        assert equals and "\n" not in rest
        assert rest.startswith(json.dumps(setting(recipe, field)))
        assert rest.endswith(", or use --engine local")
        # what a recipe for a cluster is for must run there
        assert "/" not in path or (name == "sft" and not path.endswith("sft"))
    else:
        assert f"trainer.experiment_name={recipe.run.name}" in found
        assert f"trainer.default_local_dir={FOLDER}/verl" in found


GRPO = {
    "data.train_files": ["/runs/mine/verl/train.parquet"],
    "data.val_files": ["/runs/mine/verl/val.parquet"],
    "data.train_batch_size": 32,
    "data.max_prompt_length": 640 - 256,
    "data.max_response_length": 256,
    "data.shuffle": False,
    "algorithm.adv_estimator": "grpo",
    "algorithm.norm_adv_by_std_in_grpo": True,
    "algorithm.use_kl_in_reward": False,
    "algorithm.kl_ctrl.kl_coef": 0.0,
    "algorithm.filter_groups.enable": False,
    IS: None,
    f"{ACTOR}.policy_loss.loss_mode": "vanilla",
    f"{ACTOR}.loss_agg_mode": "token-mean",
    f"{ACTOR}.clip_ratio_low": 0.2,
    f"{ACTOR}.clip_ratio_high": 0.28,
    f"{ACTOR}.clip_ratio_c": 10.0,
    f"{ACTOR}.ppo_mini_batch_size": 32,
    f"{ACTOR}.use_kl_loss": False,
    f"{ACTOR}.kl_loss_coef": 0.0,
    f"{ACTOR}.optim.lr": 1e-6,
    f"{ACTOR}.optim.betas": [0.9, 0.95],
    f"{ACTOR}.optim.lr_scheduler_type": "constant",
    f"{ROLLOUT}.name": "vllm",
    f"{ROLLOUT}.n": 8,
    f"{ROLLOUT}.top_k": -1,
    f"{ROLLOUT}.max_model_len": 640,
    f"{ROLLOUT}.val_kwargs.do_sample": True,
    "trainer.total_training_steps": 40,
    "trainer.save_freq": 10,
    "trainer.test_freq": -1,
    "trainer.val_before_train": False,
    "trainer.val_only": False,
    "trainer.resume_mode": "auto",
    "trainer.max_actor_ckpt_to_keep": 2,
    "+ray_kwargs.ray_init.address": "local",
}


def test_grpo_by_default() -> None:
    found = values(recipe_of())
    assert {key: found.get(key, "missing") for key in GRPO} == GRPO
    assert not [key for key in found if key.startswith((f"{REF}.", "critic.model", "critic.optim", "+critic."))]
    assert not [key for key in found if "lora" in key or "target_modules" in key or "loss_scale_factor" in key]
    assert found["trainer.total_epochs"] > found["trainer.total_training_steps"]  # the steps end it, not the file


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        (
            "dapo",
            {
                "algorithm.filter_groups.enable": True,
                "trainer.v1.sampler.sync_refill_failed_groups": True,
                "algorithm.filter_groups.metric": "acc",
            },
        ),
        (
            "dr_grpo",
            {
                "algorithm.norm_adv_by_std_in_grpo": False,
                f"{ACTOR}.loss_agg_mode": "seq-mean-token-sum-norm",
                f"{ACTOR}.loss_scale_factor": 256,
                f"{ACTOR}.clip_ratio_high": 0.2,
            },
        ),
        (
            "gspo",
            {
                f"{ACTOR}.policy_loss.loss_mode": "gspo",
                f"{ACTOR}.loss_agg_mode": "seq-mean-token-mean",
                f"{ACTOR}.clip_ratio_low": 3e-4,
                f"{ACTOR}.clip_ratio_high": 4e-4,
            },
        ),
        (
            "cispo",
            {
                f"{ACTOR}.policy_loss.loss_mode": "cispo",
                f"{ACTOR}.clip_ratio_low": 1.0,
                f"{ACTOR}.clip_ratio_high": 4.0,
            },
        ),
        ("rloo", {"algorithm.adv_estimator": "rloo"}),
        ("reinforce_pp", {"algorithm.adv_estimator": "reinforce_plus_plus_baseline"}),
    ],
)
def test_an_algorithm_differs_from_grpo_in_this_alone(algorithm: str, expected: dict[str, Any]) -> None:
    before, after = values(recipe_of()), values(recipe_of(algorithm=algorithm))
    assert {key: value for key, value in after.items() if before.get(key, "missing") != value} == {
        key: value for key, value in expected.items() if before.get(key, "missing") != value
    }
    assert expected.items() <= after.items()


def test_a_micro_batch_has_room_for_the_longest_sequence() -> None:
    """verl stops at one that its GPUs cannot hold together, hours after the start."""
    sizes = ("rollout.max_context=640", "rl.micro_batch_tokens=10", "cluster.sequence_parallel=4")
    found = values(recipe_of(*sizes, "rl.kl.place=loss", algorithm="ppo"))
    keys = (f"{ACTOR}.ppo_max_token_len_per_gpu", f"{ROLLOUT}.log_prob_max_token_len_per_gpu",
            f"{REF}.log_prob_max_token_len_per_gpu", "+critic.ppo_infer_max_token_len_per_gpu")  # fmt: skip
    assert [found[key] for key in keys] == [160] * 4


def test_ppo_has_a_critic() -> None:
    overrides = ("rl.critic.gamma=0.99", "rl.critic.lam=0.95", "rl.critic.epochs=2", "rl.critic.value_clip=0.3",
                 "rl.critic.warmup_steps=19", "rl.critic.optim.lr=2e-6", "cluster.sequence_parallel=4",
                 "cluster.offload=true", "rl.micro_batch_tokens=9000", "run.keep_checkpoints=0")  # fmt: skip
    found = values(recipe_of(*overrides, algorithm="ppo"))
    expected = {
        "algorithm.adv_estimator": "gae",
        "algorithm.gamma": 0.99,
        "algorithm.lam": 0.95,
        "critic.ppo_epochs": 2,
        "critic.cliprange_value": 0.3,
        "critic.optim.lr": 2e-6,
        "critic.model.path": model_path(recipe_of()),
        "critic.fsdp.ulysses_sequence_parallel_size": 4,
        "critic.fsdp.param_offload": True,
        "+critic.ppo_infer_max_token_len_per_gpu": 9000,
        "trainer.critic_warmup": 20,
        "trainer.max_critic_ckpt_to_keep": None,
        f"{ACTOR}.optim.lr": 1e-6,
    }
    assert {key: found.get(key, "missing") for key in expected} == expected
    more = values(recipe_of("cluster.critic_tokens=7000", "cluster.critic_sequence_parallel=2", algorithm="ppo"))
    assert more["trainer.critic_warmup"] == 0
    assert more["+critic.ppo_infer_max_token_len_per_gpu"] == 7000
    assert more["critic.fsdp.ulysses_sequence_parallel_size"] == 2
    evaluation = values(recipe_of(algorithm="ppo"), "evaluate")
    assert not [key for key in evaluation if key.startswith(("critic.model", "critic.optim", "+critic."))]


@pytest.mark.parametrize(
    ("place", "reward", "loss"), [("off", False, False), ("reward", True, False), ("loss", False, True)]
)
@pytest.mark.parametrize(("estimator", "name"), [("k1", "kl"), ("k2", "mse"), ("k3", "low_var_kl")])
def test_a_kl_penalty_stands_in_one_place(place: str, reward: bool, loss: bool, estimator: str, name: str) -> None:
    overrides = f"rl.kl.place={place}", f"rl.kl.estimator={estimator}", "rl.kl.coef=0.02", "cluster.logprob_tokens=7700"
    found = values(recipe_of(*overrides))
    assert (found["algorithm.use_kl_in_reward"], found["algorithm.kl_ctrl.kl_coef"]) == (reward, 0.02 * reward)
    assert (found[f"{ACTOR}.use_kl_loss"], found[f"{ACTOR}.kl_loss_coef"]) == (loss, 0.02 * loss)
    assert found["algorithm.kl_penalty"] == found[f"{ACTOR}.kl_loss_type"] == name
    assert found.get(f"{REF}.log_prob_max_token_len_per_gpu") == (7700 if reward or loss else None)


@pytest.mark.parametrize(
    ("level", "mode", "expected"),
    [("token", "truncate", ("token", 3.0)), ("sequence", "truncate", ("sequence", 3.0)), ("off", "mask", (None, None))],
)
def test_importance_weights_are_truncated(level: str, mode: str, expected: tuple[Any, Any]) -> None:
    found = values(recipe_of(f"rl.correction.level={level}", f"rl.correction.mode={mode}", "rl.correction.high=3"))
    assert found[IS] == expected[0]
    assert expected[1] in (None, found[f"{IS}_threshold"])


@pytest.mark.parametrize(("low", "high", "expected"), [(0.5, 2.0, "0.5_2"), (0.25, 4.0, "0.25_4")])
def test_importance_weights_outside_two_bounds_are_masked(low: float, high: float, expected: str) -> None:
    """verl wants ``lower_upper``, as a string."""
    bounds = f"rl.correction.low={low}", f"rl.correction.high={high}"
    found = values(recipe_of("rl.correction.level=token", "rl.correction.mode=mask", *bounds))
    assert found[f"{IS}_threshold"] == expected


def test_adapters() -> None:
    found = values(recipe_of("model.lora.rank=16", "model.lora.alpha=64"))
    keys = ("lora_rank", "lora_alpha", "target_modules")
    assert [found[f"actor_rollout_ref.model.{key}"] for key in keys] == [16, 64.0, "all-linear"]
    some = values(recipe_of("model.lora.rank=16", 'model.lora.targets=["q_proj","v_proj"]'))
    assert some["actor_rollout_ref.model.target_modules"] == ["q_proj", "v_proj"]


def test_dropout_of_adapters_is_not_dropped_in_silence() -> None:
    with pytest.raises(ConfigError, match=r"^model\.lora\.dropout = 0.1"):
        overrides_of(Job("rl", recipe_of("model.lora.rank=16", "model.lora.dropout=0.1"), FOLDER))


def test_an_evaluation_only_validates() -> None:
    found = values(recipe_of("eval.k=4", "eval.temperature=0", "eval.top_p=0.6"), "evaluate")
    expected = {
        "trainer.val_only": True,
        "trainer.val_before_train": True,
        "trainer.total_training_steps": 1,
        "trainer.resume_mode": "disable",
        f"{ROLLOUT}.val_kwargs.n": 4,
        f"{ROLLOUT}.val_kwargs.temperature": 0.0,
        f"{ROLLOUT}.val_kwargs.top_p": 0.6,
        f"{ROLLOUT}.val_kwargs.do_sample": False,
    }
    assert {key: found.get(key, "missing") for key in expected} == expected


def test_how_often() -> None:
    """verl divides by these numbers, and saves at a run's last step only where it is a multiple."""
    seldom = values(recipe_of("rl.steps=12", "rl.save_every=0", "rl.eval_every=0"))
    assert (seldom["trainer.save_freq"], seldom["trainer.test_freq"]) == (12, -1)
    often = values(recipe_of("rl.steps=12", "rl.save_every=5", "rl.eval_every=3", "run.keep_checkpoints=7"))
    assert (often["trainer.save_freq"], often["trainer.test_freq"], often["trainer.val_before_train"]) == (5, 3, True)
    assert often["trainer.max_actor_ckpt_to_keep"] == 7


def test_sampling_and_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    found = values(recipe_of("rollout.top_k=20", "rollout.top_p=0.9", "rollout.temperature=0.7", "cluster.nodes=2",
                             "cluster.gpus_per_node=4", "cluster.rollout=sglang", "cluster.tensor_parallel=2",
                             "engine.max_live=99", "rl.minibatch_prompts=8", "rl.entropy_bonus=0.001",
                             "model.device=cpu", "cluster.address=10.0.0.1:6379"))  # fmt: skip
    expected = {
        f"{ROLLOUT}.top_k": 20,
        f"{ROLLOUT}.top_p": 0.9,
        f"{ROLLOUT}.temperature": 0.7,
        f"{ROLLOUT}.name": "sglang",
        f"{ROLLOUT}.tensor_model_parallel_size": 2,
        f"{ROLLOUT}.max_num_seqs": 99,
        f"{ACTOR}.ppo_mini_batch_size": 8,
        f"{ACTOR}.entropy_coeff": 0.001,
        "trainer.nnodes": 2,
        "trainer.n_gpus_per_node": 4,
        "trainer.device": "cpu",
        "+ray_kwargs.ray_init.address": "10.0.0.1:6379",
    }
    assert {key: found.get(key, "missing") for key in expected} == expected
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert values(recipe_of())["+ray_kwargs.ray_init.address"] == "auto"


def test_a_models_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers have other working folders."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    assert model_path(make_recipe({"model": {"path": "model"}})) == str(tmp_path / "model")
    assert model_path(make_recipe({"model": {"path": "Qwen/Qwen2.5-7B"}})) == "Qwen/Qwen2.5-7B"
    assert (Path(model_path(Recipe())) / "config.json").is_file()
    found = values(make_recipe({"model": {"path": "Qwen/Qwen2.5-7B", "tokenizer": "model"}}))
    assert found["actor_rollout_ref.model.tokenizer_path"] == str(tmp_path / "model")
    assert values(Recipe())["actor_rollout_ref.model.tokenizer_path"] is None


def test_notes() -> None:
    dapo = notes_of(Job("rl", recipe_of(algorithm="dapo"), FOLDER))
    assert [note.partition(" ")[0] for note in dapo] == ["rl.dynamic_sampling.max_rounds", "verl's"]
    assert notes_of(Job("rl", recipe_of(algorithm="ppo"), FOLDER)) == []
    assert notes_of(Job("evaluate", recipe_of(algorithm="dapo"), FOLDER)) == []


# --- what is refused --------------------------------------------------------------------------------------------------

ASKS: dict[str, tuple[str, ...]] = {
    "run.deterministic": ("run.deterministic=true",),
    "model.random_init": ("model.random_init={hidden_size = 64}", "model.tokenizer=x"),
    "model.dtype": ("model.dtype=float32",),
    "model.lora.dropout": ("model.lora.rank=8", "model.lora.dropout=0.1"),
    "rl.minibatch_prompts": ("rl.prompts=24", "rl.minibatch_prompts=3", "rl.group_size=3"),
    "rl.optim.name": ("rl.optim.name=muon",),
    "rl.optim.schedule": ("rl.optim.schedule=linear",),
    "rl.critic.optim.name": ("rl.algorithm=ppo", "rl.critic.optim.name=muon"),
    "rl.critic.optim.schedule": ("rl.algorithm=ppo", "rl.critic.optim.schedule=linear"),
    "rl.critic.whiten_advantages": ("rl.algorithm=ppo", "rl.critic.whiten_advantages=false"),
    "rl.critic.whiten_returns": ("rl.algorithm=ppo", "rl.critic.whiten_returns=true"),
    "rl.overlong.filter": ("rl.overlong.filter=true",),
    "rl.dynamic_sampling.keep_surplus": ("rl.dynamic_sampling.enabled=true", "rl.dynamic_sampling.keep_surplus=true"),
    "rl.tail.oversample": ("rl.tail.oversample=1.5",),
}
"""Of each refused field a recipe that asks for it, and for nothing else that verl lacks."""


def test_every_refusal_is_tried() -> None:
    assert {field for field, _, _ in REFUSED["rl"]} <= set(ASKS)


@pytest.mark.parametrize("field", ASKS)
def test_what_verl_lacks_is_refused_in_one_line(field: str) -> None:
    recipe = recipe_of(*ASKS[field])
    with pytest.raises(ConfigError) as error:
        overrides_of(Job("rl", recipe, FOLDER))
    message = str(error.value)
    assert message.startswith(f"{field} = {json.dumps(setting(recipe, field))} with --engine verl: ")
    assert message.endswith(", or use --engine local") and "\n" not in message
    # "set it to X": with X it is a recipe that verl takes
    advised = re.search(r"set it to (one that is|'[^']*'|\S+?)(?: or .*)?, or use", message)
    assert advised, message
    mended = recipe_of(*ASKS[field], f"{field}={advised[1].replace('one that is', '8')}")
    assert not [name for name, asked, _ in REFUSED["rl"] if name == field and asked(Job("rl", mended, FOLDER))]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", JOBS)
def test_nothing_is_refused_by_default(name: str, algorithm: str) -> None:
    assert overrides_of(Job(name, recipe_of(algorithm=algorithm), FOLDER))


def test_an_evaluation_does_not_ask_for_what_only_learning_needs() -> None:
    for field in ("rl.optim.name", "rl.tail.oversample", "rl.overlong.filter"):
        assert overrides_of(Job("evaluate", recipe_of(*ASKS[field]), FOLDER))
    with pytest.raises(ConfigError, match=r"^run.deterministic = true"):
        overrides_of(Job("evaluate", recipe_of(*ASKS["run.deterministic"]), FOLDER))
    assert overrides_of(Job("rl", recipe_of("model.dtype=float32", "model.device=cpu"), FOLDER))


# --- verl's own options -----------------------------------------------------------------------------------------------


def full(name: str) -> Job:
    """A job whose table has as many options as it can."""
    lora = ("model.lora.rank=8",) if name == "rl" else ()
    return Job(name, recipe_of("rl.kl.place=loss", "rl.aggregation=constant", *lora, algorithm="ppo"), FOLDER)


@pytest.mark.parametrize("name", JOBS)
def test_what_a_field_sets_cannot_be_set_beside_it(name: str) -> None:
    job = full(name)
    owned = [option for option, _ in options_of(job) if option.field]
    for option in owned:
        key = option.key.lstrip("+")
        for override in (f"{key}=1", f"+{key}=1", f"++{key}=1", f"~{key}", f"{key} = 1"):
            with pytest.raises(ConfigError) as error:
                overrides_of(job, ["trainer.balance_batch=true", override])
            assert str(error.value) == f"--verl {override}: the recipe sets that; give {option.field}=… instead"


@pytest.mark.parametrize(
    "override", ["actor_rollout_ref.rollout={n: 4}", f"{ACTOR}.optim.betas.0=0.5", "trainer={nnodes: 7}"]
)
def test_nor_by_what_holds_it_or_is_a_part_of_it(override: str) -> None:
    """Hydra merges a whole section into its own, and sets one item of a list: both do what they say."""
    with pytest.raises(ConfigError, match="the recipe sets that"):
        overrides_of(full("rl"), [override])


@pytest.mark.parametrize("name", JOBS)
def test_what_is_chosen_for_every_run_can_be_replaced(name: str) -> None:
    job = full(name)
    before = overrides_of(job)
    free = [option for option, _ in options_of(job) if not option.field]
    assert free
    for option in free:
        for override in (f"{option.key}=other", f"++{option.key}=other", f"~{option.key}"):
            after = overrides_of(job, [override])
            kept = [line for line in before if not line.startswith(f"{option.key}=")]
            assert after == [*kept, override] and len(kept) == len(before) - 1


def test_what_has_no_line_is_added_at_the_end() -> None:
    extra = ("trainer.balance_batch=true", "+x.y=[1,2]", "~trainer.rollout_data_dir", "a/b@c.d=e")
    job = full("rl")
    assert overrides_of(job, extra) == [*overrides_of(job), *extra]


@pytest.mark.parametrize("override", ["", "x", "=3", " =3", "+=1", "~", "trainer.balance_batch", "+x"])
def test_what_is_no_option_is_refused(override: str) -> None:
    with pytest.raises(ConfigError) as error:
        overrides_of(full("rl"), [override])
    assert str(error.value).startswith(f"--verl {override!r}: write key=value, e.g. ")


# --- for people -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", JOBS)
def test_the_description_has_each_option_once_and_the_command(name: str, tmp_path: Path) -> None:
    recipe = make_recipe({"run": {"out": str(tmp_path / "my runs"), "name": "it's"}, "rl": {"algorithm": "ppo"}})
    job, extra = Job(name, recipe, tmp_path / "my runs" / "it's"), ["trainer.balance_batch=true"]
    overrides = overrides_of(job, extra)
    gpus, _, *lines = describe(name, recipe, extra)
    assert gpus.startswith(f"GPUs: {recipe.cluster.nodes} × {recipe.cluster.gpus_per_node}; ")
    fields = {option.key: option.field for option, _ in options_of(job)}
    shown = lines[1 : 1 + len(overrides)]
    for override, line in zip(overrides, shown, strict=True):
        field = fields.get(override.partition("=")[0])
        told = "--verl" if field is None else field or "chosen for every run"
        assert line.startswith(f"  {override} ")
        assert line.removeprefix(f"  {override} ").strip() == told
    assert lines[1 + len(overrides) : -3] == [f"note: {note}" for note in notes_of(job)]
    words = shlex.split(lines[-1])
    assert words[:4] == ["python", "-m", "retool.cluster.main", str(job.folder)]
    assert words[1:] == command_of(job, overrides)
    assert words[5:] == overrides


def test_the_description_says_who_replaced_a_choice() -> None:
    lines = describe("rl", Recipe(), ["reward.num_workers=4"])
    (line,) = [line for line in lines if "reward.num_workers" in line and not line.startswith("  python")]
    assert line.split() == ["reward.num_workers=4", "--verl"]


def test_a_table_is_read_and_not_changed() -> None:
    """The tables are shared by all jobs of a process: reading one changes nothing."""
    recipe = recipe_of("rl.kl.place=loss", algorithm="ppo")
    before = recipe_toml(recipe)
    assert overrides_of(Job("rl", recipe, FOLDER)) == overrides_of(Job("rl", recipe, FOLDER))
    assert recipe_toml(recipe) == before
    assert all(isinstance(option, Option) for option in TABLES["rl"])
