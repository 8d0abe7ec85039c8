"""From a file and overrides to a checked recipe, and back."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_origin

from pydantic import Field, ValidationError, model_validator

from retool.config.learning import HealthConfig, RLConfig, SFTConfig
from retool.config.section import Section
from retool.config.sections import (
    ClusterConfig,
    DataConfig,
    EngineConfig,
    EvalConfig,
    ModelConfig,
    RolloutConfig,
    RunConfig,
    SandboxConfig,
)
from retool.errors import ConfigError

SHIPPED_RECIPES = Path(__file__).parent.parent / "recipes"
"""The recipes inside the package, known by their names."""


class Recipe(Section):
    """One file for the three jobs: each reads the sections that it needs."""

    run: RunConfig = Field(default_factory=RunConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    sandbox: SandboxConfig = Field(default_factory=SandboxConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    sft: SFTConfig = Field(default_factory=SFTConfig)
    rl: RLConfig = Field(default_factory=RLConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    health: HealthConfig = Field(default_factory=HealthConfig)

    @model_validator(mode="after")
    def _possible(self) -> Recipe:
        if self.model.random_init and not self.model.tokenizer:
            raise ValueError("model.random_init needs model.tokenizer: name a tokenizer's folder or hub name")
        if self.run.deterministic and self.rl.tail.oversample > 1:
            raise ValueError(
                "run.deterministic = true: with rl.tail.oversample > 1 the batch depends on which group is done first; "
                "set one of them otherwise"
            )
        if self.sandbox.stateful and self.rl.tail.partial:
            raise ValueError(
                "sandbox.stateful = true: with rl.tail.partial a trajectory goes on in a later step, when its "
                "interpreter is gone; set one of them to false"
            )
        return self


_ENV = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def _expand_environment(value: Any, field: str) -> Any:
    """Replace ``${NAME}`` and ``${NAME:-default}`` in strings."""
    if isinstance(value, dict):
        return {k: _expand_environment(v, f"{field}.{k}" if field else k) for k, v in value.items()}
    if isinstance(value, list):
        return [_expand_environment(v, field) for v in value]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        name, default = match.group(1), match.group(2)
        found = os.environ.get(name, default)
        if found is None:
            raise ConfigError(f"{field} = {value!r}: the environment variable {name} is not set; set it")
        return found

    return _ENV.sub(replace, value)


def _section_at(parts: Sequence[Any]) -> Any:
    """The model of the section with that path; None where there is none."""
    model: Any = Recipe
    for part in parts:
        known = getattr(model, "model_fields", {})
        model = known[part].annotation if part in known else None
    return model


def _parse_value(text: str, parts: list[str]) -> Any:
    """An override's value as TOML where it is TOML, else as a plain string; a text setting takes what TOML would read
    as a number or a date as it was typed (``run.name=2026-11-22``), and a list one word (``health.stop_on=infra``)."""
    wanted = _section_at(parts)
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    if get_origin(wanted) is list and isinstance(value, str):
        return [value]
    return text if wanted is str and not isinstance(value, str) else value


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set ``section.key=value`` in ``tree``.

    Raises:
        ConfigError: the override is not of that form.
    """
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) < 2 or not all(parts):
        raise ConfigError(f"override {override!r}: write section.key=value, e.g. rl.steps=10")
    node = tree
    for part in parts[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {part!r} is a value, not a section")
    node[parts[-1]] = _parse_value(text.strip(), parts)


def _suggest(location: tuple[Any, ...]) -> str:
    """The keys that exist where an unknown one stands, the nearest first."""
    known = list(getattr(_section_at(location[:-1]), "model_fields", {}))
    near = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f"did you mean {near[0]!r}?" if near else "known here: " + ", ".join(known)


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"{name} = {first['input']!r}: there is no such setting; {_suggest(first['loc'])}"
    if first["type"] == "value_error":
        return str(first["msg"]).removeprefix("Value error, ")
    message = str(first["msg"])
    return f"{name} = {first['input']!r}: {message[0].lower()}{message[1:]}"


def make_recipe(tree: dict[str, Any]) -> Recipe:
    """Check a tree of sections.

    Raises:
        ConfigError: one line that names the field, the value and the mend.
    """
    try:
        return Recipe.model_validate(_expand_environment(tree, ""))
    except ValidationError as error:
        raise ConfigError(_one_line(error)) from None


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply overrides, the last one winning.

    Raises:
        ConfigError: the file cannot be read, is not TOML, or says something impossible.
    """
    path = Path(path)
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"recipe {str(path)!r}: {error.strerror or error}; give the path of a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {str(path)!r} is not TOML: {error}") from None
    for override in overrides:
        apply_override(tree, override)
    return make_recipe(tree)


def recipe_path(name: str | Path) -> Path:
    """The file that ``name`` means: a path first, then a recipe inside the package (``qwen2.5-7b/grpo``).

    Raises:
        ConfigError: it is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = {
        file.relative_to(SHIPPED_RECIPES).with_suffix("").as_posix(): file
        for file in sorted(SHIPPED_RECIPES.rglob("*.toml"))
    }
    plain = str(name).removesuffix(".toml").removeprefix("recipes/")
    if plain in shipped:
        return shipped[plain]
    raise ConfigError(
        f"recipe {str(name)!r}: no such file, and not a shipped recipe ({', '.join(shipped) or 'none'}); "
        "give the path of a TOML file"
    )


def recipe_toml(recipe: Recipe) -> str:
    """The whole recipe, defaults included, as TOML that ``load_recipe`` reads back to an equal one, but for
    ``sandbox.token``: people keep and share this text, and a secret must not be in it."""
    import tomli_w

    tree = recipe.model_dump(mode="json")
    tree["sandbox"]["token"] = ""
    return tomli_w.dumps(tree)
