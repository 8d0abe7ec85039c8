from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retool.config import SHIPPED_RECIPES, Recipe, apply_override, load_recipe, make_recipe, recipe_path, recipe_toml
from retool.errors import ConfigError


def with_overrides(*overrides: str) -> Recipe:
    tree: dict[str, object] = {}
    for override in overrides:
        apply_override(tree, override)
    return make_recipe(tree)


@pytest.mark.parametrize("path", sorted(SHIPPED_RECIPES.glob("*.toml")), ids=lambda p: p.name)
def test_every_shipped_recipe_loads(path: Path) -> None:
    recipe = load_recipe(path)
    assert make_recipe(tomllib.loads(recipe_toml(recipe))) == recipe


def test_an_empty_recipe_is_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "empty.toml").write_text("")
    assert load_recipe(tmp_path / "empty.toml") == Recipe()


def test_overrides_win_over_the_file_and_the_last_one_over_the_others(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("[rl]\nsteps = 3\nprompts = 16\n[rl.optim]\nlr = 1e-4\n")
    recipe = load_recipe(tmp_path / "r.toml", ["rl.steps=4", "rl.steps=5", "rl.optim.name=muon"])
    assert (recipe.rl.steps, recipe.rl.prompts, recipe.rl.optim.lr, recipe.rl.optim.name) == (5, 16, 1e-4, "muon")


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("rl.steps=10", "rl", "steps", 10),
        ("rl.steps = 10", "rl", "steps", 10),
        ("run.deterministic=true", "run", "deterministic", True),
        ("eval.temperature=0", "eval", "temperature", 0.0),
        ('model.path="a b"', "model", "path", "a b"),
        ("model.path='a b'", "model", "path", "a b"),
        ("model.path=Qwen/Qwen2.5-0.5B", "model", "path", "Qwen/Qwen2.5-0.5B"),
        ("run.name=a=b", "run", "name", "a=b"),
        ('sandbox.preload=["math", "re"]', "sandbox", "preload", ["math", "re"]),
        # TOML would read these as a number, a date and a truth value.
        ("run.name=2026", "run", "name", "2026"),
        ("run.name=2026-11-22", "run", "name", "2026-11-22"),
        ("run.name=true", "run", "name", "true"),
        # one word for a list
        ("health.stop_on=infra", "health", "stop_on", ["infra"]),
        ('run.trackers=["wandb"]', "run", "trackers", ["wandb"]),
    ],
)
def test_an_override_is_read_as_it_is_meant(override: str, section: str, key: str, value: object) -> None:
    found = getattr(getattr(with_overrides(override), section), key)
    assert found == value
    assert type(found) is type(value)


def test_an_override_reaches_a_nested_section_and_a_table() -> None:
    recipe = with_overrides(
        "sft.optim.betas=[0.8, 0.99]", "model.random_init.hidden_size=64", "model.tokenizer=somewhere"
    )
    assert recipe.sft.optim.betas == (0.8, 0.99)
    assert recipe.model.random_init == {"hidden_size": 64}


MISTAKES = [
    # an override's form
    ("rl.steps", "'rl.steps': write section.key=value"),
    ("steps=3", "'steps=3': write section.key=value"),
    ("rl.=3", "'rl.=3': write section.key=value"),
    ("=3", "write section.key=value"),
    # names
    ("rl.step=3", "rl.step = 3: there is no such setting; did you mean 'steps'?"),
    ("rl.optim.lrr=3", "rl.optim.lrr = 3: there is no such setting; did you mean 'lr'?"),
    ("rll.steps=3", "did you mean 'rl'?"),
    ("eval.zzz=3", "known here: k, temperature"),
    # types
    ("rl.steps=many", "rl.steps = 'many': input should be a valid integer"),
    ("rl.steps=1.5", "rl.steps = 1.5: "),
    ("rl.steps=true", "rl.steps = True: input should be a number"),
    ("sft.optim.lr=false", "sft.optim.lr = False: input should be a number"),
    ("sandbox.preload=3", "sandbox.preload = 3: input should be a valid list"),
    ("run.deterministic=maybe", "run.deterministic = 'maybe': "),
    # ranges
    ("rl.steps=0", "rl.steps = 0: input should be greater than or equal to 1"),
    ("rl.group_size=1", "rl.group_size = 1: grpo compares"),
    ("run.name=", "run.name = '': "),
    ("eval.temperature=inf", "eval.temperature = inf: input should be a finite number"),
    ("eval.temperature=nan", "eval.temperature = nan: "),
    ("eval.top_p=0", "eval.top_p = 0: "),
    ("sandbox.timeout_s=inf", "sandbox.timeout_s = inf: input should be a finite number"),
    ("rl.optim.betas=[0.9, 1.0]", "rl.optim.betas.1 = 1.0: input should be less than 1"),
    ("model.device=tpu", "model.device = 'tpu': input should be 'auto', 'cpu' or 'cuda'"),
    # settings that do not go together
    ("rl.minibatch_prompts=5", "rl.minibatch_prompts = 5 does not divide rl.prompts = 32: choose a divisor"),
    ("rollout.max_context=100", "leaves no room for a prompt in rollout.max_context = 100: make max_context larger"),
    ("data.source=gsm8k", "data.source = 'gsm8k': there is no such setting"),
    ("data.train=", "data.train = '': "),
    ("rollout.prompt_file=a.txt", "is for rollout.format = 'code_tags'"),
    ("rollout.format=tags", "rollout.format = 'tags': "),
    ("model.random_init.hidden_size=64", "model.random_init needs model.tokenizer: name a tokenizer"),
]


@pytest.mark.parametrize(("override", "says"), MISTAKES, ids=[override for override, _ in MISTAKES])
def test_a_mistake_is_one_line_that_says_what_to_do(override: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        with_overrides(override)
    message = str(caught.value)
    assert says in message
    assert "\n" not in message


def test_a_value_cannot_be_a_section() -> None:
    with pytest.raises(ConfigError, match="'steps' is a value, not a section"):
        with_overrides("rl.steps=3", "rl.steps.more=4")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"[rl\n", "is not TOML"),
        (b"[rl]\nsteps = 1\nsteps = 2\n", "is not TOML"),
        (b"\xff\xfe", "is not TOML"),
        (b"steps = 5\n", "steps = 5: there is no such setting; known here: run, model"),
        (b"rl = 5\n", "rl = 5: "),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml.*No such file.*give the path"):
        load_recipe(tmp_path / "none.toml")


def test_environment_variables_are_replaced() -> None:
    home = os.environ["PATH"]
    recipe = make_recipe({"model": {"path": "${PATH}/x"}, "sandbox": {"preload": ["${RETOOL_UNSET:-math}"]}})
    assert recipe.model.path == home + "/x"
    assert recipe.sandbox.preload == ["math"]
    assert make_recipe({"rl": {"steps": "${RETOOL_UNSET:-7}"}}).rl.steps == 7
    with pytest.raises(ConfigError, match=r"model\.path = .*RETOOL_UNSET is not set; set it"):
        make_recipe({"model": {"path": "${RETOOL_UNSET}"}})


def test_a_recipe_is_a_path_first(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("")
    assert recipe_path(path) == path
    assert recipe_path(str(path)) == path


def test_a_recipe_is_then_a_shipped_name() -> None:
    assert recipe_path("quickstart") == SHIPPED_RECIPES / "quickstart.toml"


@pytest.mark.parametrize("name", ["no-such", "", ".", "quickstart.tom"])
def test_an_unknown_recipe_is_one_line_with_what_there_is(name: str) -> None:
    with pytest.raises(ConfigError, match=r"no such file, and not a shipped recipe \(.*\); give the path"):
        recipe_path(name)


@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda t: "${" not in t),
    sizes=st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.integers(-(2**62), 2**62), max_size=3),
    lr=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    tools=st.booleans(),
)
def test_a_recipe_written_is_read_back_equal(text: str, sizes: dict[str, int], lr: float, tools: bool) -> None:
    recipe = make_recipe(
        {
            "run": {"name": text},
            "model": {"random_init": sizes, "tokenizer": text},
            "sandbox": {"preload": [text, "math"]},
            "rollout": {"tools": tools},
            "rl": {"dual_clip": float("inf"), "optim": {"lr": lr}},
        }
    )
    assert make_recipe(tomllib.loads(recipe_toml(recipe))) == recipe


@pytest.mark.parametrize("url", ["http://127.0.0.1:8080", "https://box.example.org/path/", "http://[::1]:80", ""])
def test_a_services_address_is_a_url(url: str) -> None:
    assert with_overrides(f"sandbox.url={url}").sandbox.url == url


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8080", "localhost", "ftp://a", "http://", "file:///tmp", "http://[::1", "http://a:b"]
)
def test_another_address_is_refused_in_one_line(url: str) -> None:
    with pytest.raises(ConfigError, match=r"^sandbox\.url = .*: give an address like 'http://127\.0\.0\.1:8080'$"):
        with_overrides(f"sandbox.url={url}")


@pytest.mark.parametrize(
    "override",
    [
        "sandbox.url=http://me:s3cret@host",
        'sandbox.token="s3cret\\n"',
        "sandbox.token=s3crét",
        'sandbox.token=" s3cret"',
    ],
)
def test_a_refused_secret_is_not_shown(override: str) -> None:
    with pytest.raises(ConfigError, match=r"^sandbox\.(url|token) holds ") as raised:
        with_overrides(override)
    assert "s3cr" not in str(raised.value)


def test_a_recipes_text_has_no_token() -> None:
    recipe = make_recipe({"sandbox": {"url": "http://h", "token": "s3cret"}})
    assert recipe.sandbox.token == "s3cret"
    assert "s3cret" not in recipe_toml(recipe)
    assert make_recipe(tomllib.loads(recipe_toml(recipe))).sandbox.url == "http://h"
