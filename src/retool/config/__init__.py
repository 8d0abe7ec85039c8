"""Recipes: TOML files, ``section.key=value`` overrides, and every check of a user's input.

Nothing here imports torch. A mistake ends in one line (``ConfigError``) that names the field, the value and the mend.
"""

from retool.config.learning import (
    ALARMS,
    ALGORITHMS,
    CriticConfig,
    HealthConfig,
    KLConfig,
    OptimConfig,
    RLConfig,
    SFTConfig,
)
from retool.config.reading import (
    SHIPPED_RECIPES,
    Recipe,
    apply_override,
    load_recipe,
    make_recipe,
    recipe_path,
    recipe_toml,
)
from retool.config.sections import (
    ClusterConfig,
    DataConfig,
    EngineConfig,
    EvalConfig,
    LoraConfig,
    ModelConfig,
    RolloutConfig,
    RunConfig,
    SandboxConfig,
)

__all__ = [
    "ALARMS",
    "ALGORITHMS",
    "SHIPPED_RECIPES",
    "ClusterConfig",
    "CriticConfig",
    "DataConfig",
    "EngineConfig",
    "EvalConfig",
    "HealthConfig",
    "KLConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimConfig",
    "RLConfig",
    "Recipe",
    "RolloutConfig",
    "RunConfig",
    "SFTConfig",
    "SandboxConfig",
    "apply_override",
    "load_recipe",
    "make_recipe",
    "recipe_path",
    "recipe_toml",
]
