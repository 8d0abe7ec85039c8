"""What the launcher starts: verl's SFT trainer, or its PPO trainer with our recorder beside it.

    python -m retool.cluster.main RUN_FOLDER JOB key=value …

The folder holds the recipe (``config.toml``) and the data; the rest are verl's options. A mistake of the user ends in
one line in ``verl/error.json``, for the launcher. The process ends when its standard input does, so that it cannot
outlive whoever started it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retool.config import Recipe, load_recipe
from retool.errors import ConfigError, InfraError, ReToolError, UserError

TOKEN = "RETOOL_SANDBOX_TOKEN_VALUE"
"""The environment variable that carries ``sandbox.token``, which ``config.toml`` does not hold."""
ERROR = "error.json"


def compose(overrides: Sequence[str], name: str = "ppo_trainer") -> Any:
    """verl's configuration with ``overrides``. Needs no GPU, and does not import verl's trainers.

    Raises:
        ConfigError: an option that verl does not have, or a value that does not fit.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    spec = importlib.util.find_spec("verl")
    assert spec is not None and spec.origin is not None, "verl is not installed"
    try:
        with initialize_config_dir(str(Path(spec.origin).parent / "trainer" / "config"), version_base=None):
            return hydra_compose(name, overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"verl's options: {reason}; see docs/cluster.md for what --verl takes") from None


def train(recipe: Recipe, folder: Path, job: str, overrides: Sequence[str]) -> None:
    """Run verl's trainer until it is done."""
    from verl.trainer.main_ppo import run_ppo
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config
    from verl.utils.device import auto_set_device

    from retool.cluster.trainer import RunnerHere

    config = compose(overrides)
    auto_set_device(config)
    try:
        validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
    except (AssertionError, ValueError) as error:
        raise ConfigError(f"verl refuses its options: {' '.join(str(error).split())}") from None
    run_ppo(config, RunnerHere(recipe, folder, job))


def _take_token() -> None:
    """``ray start`` asks for a token where there is one, and ``ray.init`` brings it only where it was told to before
    Ray was imported."""
    if (Path.home() / ".ray" / "auth_token").is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _follow_parent() -> None:
    """End this process when its standard input ends."""

    def wait() -> None:
        while os.read(0, 4096):  # not sys.stdin, whose lock this thread would hold when Python ends
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def main(arguments: Sequence[str]) -> int:
    folder, job, overrides = Path(arguments[0]), arguments[1], arguments[2:]
    _follow_parent()
    _take_token()
    try:
        recipe = load_recipe(folder / "config.toml", [f"sandbox.token={json.dumps(os.environ.pop(TOKEN, ''))}"])
        if job == "sft":
            from retool.cluster.sft import train_sft

            train_sft(recipe, folder, overrides)
        else:
            train(recipe, folder, job, overrides)
    except (ReToolError, ConnectionError) as error:
        kind = "user" if isinstance(error, UserError) else "infra"
        if isinstance(error, ConnectionError):
            error = InfraError(f"Ray at {recipe.cluster.address or os.environ.get('RAY_ADDRESS', '')}: {error}")
        (folder / "verl" / ERROR).write_text(json.dumps({"kind": kind, "message": str(error)}), encoding="utf-8")
        print(f"retool: error: {error}", file=sys.stderr)
        return 2 if kind == "user" else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
