"""What a recipe may ask of the local engine and not of verl, and where verl does otherwise."""

from __future__ import annotations

from collections.abc import Callable

from retool.cluster.option import Job, has_critic, value_of

Refusal = tuple[str, Callable[[Job], bool], str]
"""A field, whether the recipe sets it to what verl lacks, and why and what to do."""

REFUSED_EVAL: tuple[Refusal, ...] = (
    ("run.deterministic", lambda job: job.recipe.run.deterministic, "verl does not promise that; set it to false"),
    ("model.random_init", lambda job: bool(job.recipe.model.random_init), "verl loads a model; set it to {}"),
    (
        "model.dtype",
        lambda job: job.recipe.model.dtype == "float32" and job.recipe.model.device != "cpu",
        "verl keeps float32 masters and computes in bfloat16; set it to 'auto'",
    ),
)
"""Of every job."""


def optimiser_refusals(field: str, when: Callable[[Job], bool] = lambda job: True) -> tuple[Refusal, ...]:
    """Of an optimiser's section."""
    name_of, schedule_of = value_of(f"{field}.name"), value_of(f"{field}.schedule")
    return (
        (f"{field}.name", lambda job: when(job) and name_of(job) != "adamw", "verl has no Muon; set it to 'adamw'"),
        (
            f"{field}.schedule",
            lambda job: when(job) and schedule_of(job) == "linear",
            "verl has none such; set it to 'constant' or 'cosine'",
        ),
    )


def _uneven(job: Job) -> bool:
    """Whether an update's trajectories cannot be shared out evenly."""
    rl, cluster = job.recipe.rl, job.recipe.cluster
    gpus = cluster.nodes * cluster.gpus_per_node
    parallel = {cluster.sequence_parallel}
    parallel |= {cluster.critic_sequence_parallel or cluster.sequence_parallel} if has_critic(job) else set()
    return any((rl.minibatch_prompts or rl.prompts) * rl.group_size % (gpus // shared) for shared in parallel)


REFUSED_RL: tuple[Refusal, ...] = (
    *REFUSED_EVAL,
    (
        "model.lora.dropout",
        lambda job: job.recipe.model.lora.dropout > 0,
        "RL compares log-probabilities with and without it; set it to 0",
    ),
    (
        "rl.minibatch_prompts",
        _uneven,
        "times rl.group_size it is not a multiple of the GPUs by cluster.sequence_parallel; set it to one that is",
    ),
    *optimiser_refusals("rl.optim"),
    *optimiser_refusals("rl.critic.optim", has_critic),
    (
        "rl.critic.whiten_advantages",
        lambda job: has_critic(job) and not job.recipe.rl.critic.whiten_advantages,
        "verl always whitens GAE's; set it to true",
    ),
    (
        "rl.critic.whiten_returns",
        lambda job: has_critic(job) and job.recipe.rl.critic.whiten_returns,
        "verl has none such; set it to false",
    ),
    ("rl.overlong.filter", lambda job: job.recipe.rl.overlong.filter, "verl has none such; set it to false"),
    (
        "rl.dynamic_sampling.keep_surplus",
        lambda job: job.recipe.rl.dynamic_sampling.keep_surplus,
        "verl's synchronous trainer throws the surplus away; set it to false",
    ),
    (
        "rl.tail.oversample",
        lambda job: job.recipe.rl.tail.oversample > 1,
        "verl's own way is --verl trainer.v1.trainer_mode=colocate_async; set it to 1",
    ),
)


NOTES: tuple[tuple[Callable[[Job], bool], str], ...] = (
    (
        lambda job: job.name == "rl" and job.recipe.rl.dynamic_sampling.enabled,
        "rl.dynamic_sampling.max_rounds does not bound verl: it draws tasks until the batch is full",
    ),
    (
        lambda job: job.name == "rl" and job.recipe.rl.compares_groups,
        "verl's loss divides by the tokens of groups of equal rewards too; the local engine leaves them out",
    ),
)
"""Where a run on verl differs from one on the local engine: shown, not refused."""


def notes_of(job: Job) -> list[str]:
    return [note for concerns, note in NOTES if concerns(job)]
