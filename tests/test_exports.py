"""The public surface changes on purpose only: whoever changes it changes this file, and CHANGELOG.md with it."""

from __future__ import annotations

import inspect
from typing import Any

import click
import pytest
from pydantic import BaseModel

import retool
from retool import errors, protocols, types
from retool.cli import cli
from retool.config import Recipe

TYPES = """Conversation Execution ExecutionRequest ExecutionResult ExecutionStatus Finish Grade Message SamplingParams
StopReason Task TokenOutput ToolCall Trajectory TrajectoryGroup Turn"""
ERRORS = (
    "ConfigError DataError HealthError InfraError InvariantError ReToolError SandboxBroken SandboxRefused UserError"
)
PROTOCOLS = "Grader Policy Sandbox Task ToolFormat Tracker"
ENUMS = {
    types.ExecutionStatus: "ok error timeout memory output_limit killed infra",
    types.Finish: "stop length abort",
    types.StopReason: "answered max_turns max_tokens context_full malformed infra",
}
COMMANDS = {
    "quickstart": "overrides --from-scratch --with-control --seed --out --quiet",
    "doctor": "--json",
    "sft": "recipe overrides --engine --verl --quiet --dry-run",
    "rl": "recipe overrides --engine --verl --quiet --dry-run",
    "eval": "recipe overrides --engine --verl --quiet --dry-run --model",
    "data list": "",
    "data prepare": """name --out --file --against --ngram --min-share --split --column --no-chinese --keep-duplicates
        --limit --form --execute --timeout --json --quiet""",
    "data show": "file --rows --first",
    "cold-start": """name --out --teacher --model --key-env --file --against --ngram --min-share --split --column
        --limit --samples --concurrency --max-requests --max-total-tokens --max-tokens --temperature --timeout --retries
        --timeout-code --sandbox-url --keep-textual --form --stateful --restart --json --quiet""",
    "sandbox run": "file --timeout --memory-mb --json",
    "sandbox serve": """--host --port --token --workers --timeout --memory-mb --output-kb --file-mb --tier --max-queue
        --preload --drain --access-log --quiet""",
    "sandbox bench": "--workload --concurrency --requests --http --workers --json",
    "report": "run",
}
OPTIM = "name lr muon_lr betas weight_decay warmup_steps schedule final_lr_share grad_clip"
SETTINGS = {
    "run": "name out seed deterministic resume threads keep_checkpoints trackers project",
    "model": "path tokenizer dtype device random_init",
    "model.lora": "rank alpha dropout targets save_merged",
    "data": """train train_file test test_file columns against chinese train_size test_size test_split
        sft_tool_share""",
    "sandbox": """tier workers timeout_s cpu_s memory_mb output_kb file_mb max_files processes stateful session_idle_s
        preload retries url token concurrency""",
    "rollout": """format prompt_file tools max_turns max_response_tokens max_context max_observation_tokens
        max_malformed temperature top_p top_k""",
    "engine": "kv_budget_mb max_live prefill_chunk gradient_checkpointing",
    "cluster": """nodes gpus_per_node address rollout tensor_parallel sequence_parallel critic_sequence_parallel offload
        gpu_memory_share logprob_tokens critic_tokens agent_workers""",
    "sft": "steps epochs batch_size micro_batch_tokens max_tokens eval_every save_every",
    "sft.optim": OPTIM,
    "rl": """algorithm advantage loss aggregation steps prompts group_size minibatch_prompts micro_batch_tokens clip_low
        clip_high dual_clip entropy_bonus reward grading eval_every eval_size eval_split save_every""",
    "rl.optim": OPTIM,
    "rl.critic": "gamma lam warmup_steps epochs value_clip whiten_advantages whiten_returns",
    "rl.critic.optim": OPTIM,
    "rl.kl": "place coef estimator",
    "rl.dynamic_sampling": "enabled max_rounds keep_surplus",
    "rl.overlong": "buffer_share penalty filter",
    "rl.correction": "level mode high low",
    "rl.tail": "oversample partial",
    "eval": "k temperature top_p bootstrap",
    "health": """stop_on window call_rate_low malformed_high entropy_low entropy_high gap_high zero_variance_high
        cut_high infra_high spike max_skipped""",
}


def defined_in(module: Any) -> set[str]:
    """Public classes of the module itself, and its type aliases."""
    return {
        name
        for name, member in vars(module).items()
        if not name.startswith("_")
        and ((getattr(member, "__module__", None) == module.__name__ and inspect.isclass(member)) or name == "Message")
    }


def test_the_types() -> None:
    assert defined_in(types) == set(TYPES.split())


def test_the_errors() -> None:
    assert defined_in(errors) == set(ERRORS.split())


def test_the_protocols() -> None:
    assert set(protocols.__all__) == set(PROTOCOLS.split())


@pytest.mark.parametrize("enum", ENUMS)
def test_the_endings(enum: Any) -> None:
    """Their values stand in run folders that people keep."""
    assert [str(member) for member in enum] == ENUMS[enum].split()


def commands_of(group: click.Group, prefix: str = "") -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            found |= commands_of(command, f"{prefix}{name} ")
        else:
            found[prefix + name] = [
                str(p.name) if isinstance(p, click.Argument) else next(o for o in p.opts if o.startswith("--"))
                for p in command.params
            ]
    return found


def test_the_commands() -> None:
    assert commands_of(cli) == {name: parameters.split() for name, parameters in COMMANDS.items()}


def settings_of(section: BaseModel, prefix: str = "") -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in section:
        if isinstance(value, BaseModel):
            found[prefix + name] = [key for key, inner in value if not isinstance(inner, BaseModel)]
            found |= settings_of(value, f"{prefix}{name}.")
    return found


def test_the_settings() -> None:
    assert settings_of(Recipe()) == {name: keys.split() for name, keys in SETTINGS.items()}


def test_every_setting_has_a_default_that_is_allowed() -> None:
    assert Recipe.model_validate(Recipe().model_dump()) == Recipe()


def test_the_version_is_the_distributions() -> None:
    from importlib.metadata import version

    assert version("retool") == retool.__version__
