"""verl's ReTool recipe for Qwen2.5-32B, written for verl 0.9.1: what each of our recipes must compose to.

Read from ``recipe/retool/run_qwen2-32b_{sft,dapo,ppo}.sh`` (verl pinned to 0.6.1; since moved to
verl-project/verl-recipe, ``retool/``). ``…_dapo.sh`` is GRPO with the clip raised above, nothing else of DAPO: it is
``REFERENCE_GRPO`` here. The keys are 0.9.1's; where the script's name differs, it stands in the comment.
``DEFAULTS_*`` is what the scripts leave to 0.6.1's defaults, and what a run of them therefore had; those that 0.9.1
changed are marked. docs/cluster.md explains.
"""

from __future__ import annotations

from typing import Any

# --- supervised fine-tuning: run_qwen2-32b_sft.sh ---------------------------------------------------------------------

REFERENCE_SFT: dict[str, Any] = {
    "data.max_length": 16384,
    "data.train_batch_size": 32,
    "data.messages_key": "messages",  # data.multiturn.messages_key
    "data.tools_key": "tools",  # data.multiturn.tools_key
    "model.use_remove_padding": True,  # use_remove_padding
    "engine.ulysses_sequence_parallel_size": 4,  # ulysses_sequence_parallel_size
    "trainer.total_epochs": 6,
}

DEFAULTS_SFT: dict[str, Any] = {
    "optim.lr": 1e-5,  # 0.9.1: 1e-3
    "optim.betas": [0.9, 0.95],  # 0.9.1: [0.9, 0.999]
    "optim.weight_decay": 0.01,
    "optim.clip_grad": 1.0,
    "optim.lr_scheduler_type": "cosine",  # optim.lr_scheduler; 0.9.1: constant
    "optim.min_lr_ratio": 0.0,
    "model.enable_gradient_checkpointing": True,
    "engine.model_dtype": "fp32",  # model.fsdp_config.model_dtype
    "engine.param_offload": False,  # model.fsdp_config.cpu_offload
}

LAUNCH_SFT: dict[str, int] = {"nnodes": 2, "nproc_per_node": 8}
"""torchrun's own options."""

# --- reinforcement learning: what run_qwen2-32b_dapo.sh and run_qwen2-32b_ppo.sh share --------------------------------

_RL: dict[str, Any] = {
    "algorithm.use_kl_in_reward": False,
    "algorithm.kl_ctrl.kl_coef": 0.0,
    "data.return_raw_chat": True,
    "data.max_prompt_length": 2048,
    "data.max_response_length": 16384,
    "data.truncation": "error",
    "actor_rollout_ref.model.use_remove_padding": True,
    "actor_rollout_ref.model.enable_gradient_checkpointing": True,
    "actor_rollout_ref.actor.use_kl_loss": False,
    "actor_rollout_ref.actor.kl_loss_coef": 0.0,
    "actor_rollout_ref.actor.clip_ratio_low": 0.2,
    "actor_rollout_ref.actor.clip_ratio_high": 0.28,
    "actor_rollout_ref.actor.clip_ratio_c": 10.0,
    "actor_rollout_ref.actor.optim.lr": 1e-6,
    "actor_rollout_ref.actor.use_dynamic_bsz": True,
    "actor_rollout_ref.actor.fsdp_config.param_offload": True,
    "actor_rollout_ref.actor.fsdp_config.optimizer_offload": True,
    "actor_rollout_ref.rollout.name": "vllm",
    "actor_rollout_ref.rollout.mode": "async",
    "actor_rollout_ref.rollout.tensor_model_parallel_size": 4,
    "actor_rollout_ref.rollout.gpu_memory_utilization": 0.9,
    "actor_rollout_ref.rollout.val_kwargs.top_p": 0.6,
    "actor_rollout_ref.rollout.val_kwargs.temperature": 1.0,
    "actor_rollout_ref.rollout.val_kwargs.n": 30,
    "trainer.n_gpus_per_node": 8,
    "trainer.nnodes": 2,
    "trainer.val_before_train": True,
    "trainer.save_freq": 30,
    "trainer.test_freq": 5,
}

_DEFAULTS_RL: dict[str, Any] = {
    "algorithm.norm_adv_by_std_in_grpo": True,
    "actor_rollout_ref.actor.policy_loss.loss_mode": "vanilla",
    "actor_rollout_ref.actor.loss_agg_mode": "token-mean",
    "actor_rollout_ref.actor.entropy_coeff": 0,
    "actor_rollout_ref.actor.ppo_epochs": 1,
    "actor_rollout_ref.actor.optim.betas": [0.9, 0.999],
    "actor_rollout_ref.actor.optim.weight_decay": 0.01,
    "actor_rollout_ref.actor.optim.lr_scheduler_type": "constant",  # actor.optim.warmup_style
    "actor_rollout_ref.actor.optim.clip_grad": 1.0,  # actor.grad_clip, which 0.9.1 still has but does not read
    "actor_rollout_ref.actor.fsdp_config.model_dtype": "fp32",
    "actor_rollout_ref.rollout.temperature": 1.0,
    "actor_rollout_ref.rollout.top_p": 1.0,
    "actor_rollout_ref.rollout.top_k": -1,
    "actor_rollout_ref.rollout.val_kwargs.top_k": -1,
    "actor_rollout_ref.rollout.agent.num_workers": 8,
    "actor_rollout_ref.rollout.max_num_seqs": 1024,  # 0.9.1: 256
}

# --- GRPO: run_qwen2-32b_dapo.sh --------------------------------------------------------------------------------------

REFERENCE_GRPO: dict[str, Any] = {
    **_RL,
    "algorithm.adv_estimator": "grpo",
    "data.train_batch_size": 512,
    "actor_rollout_ref.actor.ppo_mini_batch_size": 64,
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": 18432,  # (2048 + 16384) × 1
    "actor_rollout_ref.actor.ulysses_sequence_parallel_size": 8,
    "actor_rollout_ref.rollout.n": 16,
}

DEFAULTS_GRPO: dict[str, Any] = {
    **_DEFAULTS_RL,
    "algorithm.filter_groups.enable": False,
    "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu": 18432,  # as the actor's, not × 4
}

# --- PPO: run_qwen2-32b_ppo.sh ----------------------------------------------------------------------------------------

REFERENCE_PPO: dict[str, Any] = {
    **_RL,
    "algorithm.adv_estimator": "gae",
    "algorithm.gamma": 1.0,
    "algorithm.lam": 1.0,
    "data.train_batch_size": 1024,
    "actor_rollout_ref.actor.ppo_mini_batch_size": 256,
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": 36864,  # (2048 + 16384) × 2
    "actor_rollout_ref.actor.ulysses_sequence_parallel_size": 4,
    "critic.optim.lr": 2e-6,
    "critic.model.use_remove_padding": True,
    "critic.model.enable_gradient_checkpointing": True,
    "critic.ppo_infer_max_token_len_per_gpu": 73728,  # critic.ppo_max_token_len_per_gpu: (2048 + 16384) × 4
    "critic.fsdp.ulysses_sequence_parallel_size": 4,  # critic.ulysses_sequence_parallel_size
    "critic.fsdp.param_offload": True,  # critic.model.fsdp_config.param_offload
    "critic.fsdp.optimizer_offload": True,  # critic.model.fsdp_config.optimizer_offload
    "trainer.critic_warmup": 20,
}

DEFAULTS_PPO: dict[str, Any] = {
    **_DEFAULTS_RL,
    "actor_rollout_ref.rollout.n": 1,
    "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu": 36864,  # as the actor's
    "critic.ppo_mini_batch_size": 256,  # as the actor's
    "critic.ppo_epochs": 1,
    "critic.cliprange_value": 0.5,
    "critic.loss_agg_mode": "token-mean",
    "critic.optim.betas": [0.9, 0.999],
    "critic.optim.weight_decay": 0.01,
    "critic.optim.lr_scheduler_type": "constant",
    "critic.optim.clip_grad": 1.0,  # critic.grad_clip, which 0.9.1 still has but does not read
    "critic.fsdp.model_dtype": "fp32",  # critic.model.fsdp_config.model_dtype
}

# --- DAPO in full -----------------------------------------------------------------------------------------------------

REFERENCE_DAPO: dict[str, Any] = {
    **REFERENCE_GRPO,
    "algorithm.filter_groups.enable": True,
    "algorithm.filter_groups.metric": "acc",
    "actor_rollout_ref.actor.loss_agg_mode": "token-mean",  # actor.use_token_level_loss
}
"""No script runs ReTool with all of DAPO. This is ``REFERENCE_GRPO`` with what verl's own DAPO recipe
(``recipe/dapo/run_dapo_qwen2.5_32b.sh``; arXiv 2503.14476) adds to GRPO; its sizes (20,480 tokens, mini-batch 32,
warm-up 10, weight decay 0.1, 16 nodes) belong to another experiment and are left out."""

RECIPE_DAPO: dict[str, Any] = {
    "rl.overlong.buffer_share": 0.2,  # overlong_buffer.len = 4096 of 20,480 response tokens
    "rl.overlong.penalty": 1.0,  # overlong_buffer.penalty_factor
    "rl.overlong.filter": False,
}
"""The soft overlong punishment is in our reward, so these are our fields and not verl's keys. (verl's own would be
``reward.reward_manager.name=dapo +reward.reward_kwargs.{max_resp_len,overlong_buffer_cfg}``.)"""

# --- what does not compare --------------------------------------------------------------------------------------------

ADDED: tuple[str, ...] = ("critic.ppo_infer_max_token_len_per_gpu",)
"""Fields of 0.9.1's data classes that its YAML files lack: to be given with a ``+``."""

GONE: tuple[tuple[str, str], ...] = (
    # gone, or without effect, in 0.9.1
    (
        "custom_reward_function.path",
        "at top level it composes and is ignored: reward.custom_reward_function.path; ours",
    ),
    ("custom_reward_function.name", "likewise; our agent loop grades"),
    ("critic.model.fsdp_config.*", "refused by Hydra: critic.fsdp.*"),
    ("critic.ppo_max_token_len_per_gpu", "composes and is not read: critic.ppo_infer_max_token_len_per_gpu"),
    ("actor_rollout_ref.ref.log_prob_max_token_len_per_gpu", "(2048 + 16384) × 4 (GRPO); no reference model runs"),
    ("trainer.total_epochs", "1: ours counts steps, 150 and 250: trainer.total_training_steps"),
    ("critic.ulysses_sequence_parallel_size", "composes and is ignored: critic.fsdp.ulysses_sequence_parallel_size"),
    ("algorithm.filter_groups.max_num_gen_batches", "ignored with a warning: there is no limit (DAPO; 10 there)"),
    ("data.gen_batch_size", "set to 1 with filter_groups: prompts are replaced one by one (DAPO; 1536 there)"),
    ("reward_model.reward_manager", "at top level ignored: reward.reward_manager.name; our reward does it (DAPO)"),
    ("custom_reward_function.overlong_buffer.*", "reward.reward_kwargs; our reward does it: RECIPE_DAPO (DAPO)"),
    ("data.multiturn.enable", "conversations are the only kind of SFT data that is left"),
    ("model.partial_pretrain", "model.path: a start of the user's own"),
    ("data.micro_batch_size_per_gpu", "4 conversations over 4 GPUs; ours packs tokens: data.max_token_len_per_gpu"),
    ("optim.lr_warmup_steps_ratio", "not set: 0.1 in 0.6.1, 37 of 372 steps; ours counts steps: optim.lr_warmup_steps"),
    # ours instead
    ("model.strategy", "fsdp (SFT; RL leaves it at that): fsdp2, the same sharding, kept up by PyTorch"),
    ("actor_rollout_ref.rollout.multi_turn.enable", "our agent loop; verl's is not used"),
    ("actor_rollout_ref.rollout.multi_turn.max_user_turns", "8 tool answers: rollout.max_turns bounds them too"),
    ("actor_rollout_ref.rollout.multi_turn.max_assistant_turns", "8: rollout.max_turns"),
    ("actor_rollout_ref.rollout.multi_turn.tool_config_path", "our sandbox: [sandbox]; 30 s and 1,024 MB, as there"),
    ("actor_rollout_ref.rollout.multi_turn.format", "hermes: rollout.format"),
    ("data.custom_cls.path", "our Parquet files have verl's columns: its own data set reads them"),
    ("data.custom_cls.name", "likewise"),
    ("data.filter_overlong_prompts", "True; prompts without room are left out, and counted, when the files are made"),
    ("data.train_files", "DAPO-Math-17k, ReTool-SFT: data.train; ours are cleaned and decontaminated"),
    ("data.val_files", "AIME 2025: data.test; the SFT script measures its loss on the training file"),
    # the user's own
    ("actor_rollout_ref.model.path", "a start of the user's own: model.path"),
    ("critic.model.path", "likewise, the actor's"),
    ("trainer.default_local_dir", "the run folder"),
    ("trainer.project_name", "run.project"),
    ("trainer.experiment_name", "run.name"),
    ("trainer.logger", "console and wandb: run.trackers, and a file always"),
    ("trainer.log_val_generations", "100: the run folder has every trajectory"),
)
"""Options that the scripts set and that have no line above, and why. Those marked DAPO are of verl's DAPO recipe."""
