"""One RL step with a tool: ReTool against TRL's GRPOTrainer, same checkpoint, tasks, tool and reward.

    python benchmarks/rl_step_vs_trl.py --trl-python trl-env/bin/python --rounds 3

A step is 32 prompts × 8 samples with code execution and one optimiser step, in fp32 on the CPU, without vLLM. The
default checkpoint is made on the spot: the first two layers of nano (0.5M parameters), whose prompts are lengthened to
the sizes below, fine-tuned until about half of its trajectories call the tool. Each round starts a fresh process for
each side, one after the other, so that a busy machine is busy for both.

What is the same: checkpoint, chat template, prompt ids, tasks, sandbox, cut of the tool's output, grader, reward,
budget of tokens, optimiser, learning rate, clipping, token-level loss (TRL's "dapo"). What is TRL's own: it finds calls
with a response schema, waits for one run of code after the other, and samples each turn for the whole batch at once.

CPU seconds are the trainer's process with all its threads; unlike wall seconds they hardly change where other programs
want the same cores. Peak RSS is that process too (VmHWM); the sandbox's processes are in neither, on both sides.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Coroutine
from itertools import pairwise
from pathlib import Path
from typing import Any

PROMPTS, SAMPLES = 32, 8
RESPONSE_TOKENS = 96
"""Sampled and observed tokens of a trajectory at most."""
LAYERS = 2
"""Of nano's three: 0.52M parameters, the size for which the goals were set."""
COMMON_TOKENS = 167
"""Tokens that all prompts begin with; with the question a prompt has about 195."""
LEARNING_RATE = 1e-6
"""So small that the share of trajectories with a call stays what it was over the steps of a benchmark."""
MICRO_BATCH_TOKENS = 2000
"""Ours. Against 6,000: a fifth less CPU time in training, since the work stays in the cache, and 200 MB less memory."""
TRL_BATCH = 32
"""TRL's per_device_train_batch_size."""
TOOL_SHARE = 0.5
SEED = 11
GOAL_S, GOAL_MB = 1.9, 800.0
RESULT = "RESULT "
"""Begins the line that a side's process prints for its parent."""
TOOL_INTRODUCTION = "\\n\\nYou can call this tool:\\n"
"""As nano's chat template spells it."""
PADDING = "Some problems need a long calculation. It is best to use code for them and then to give the final answer. "

RESPONSE_SCHEMA = {
    "type": "object",
    "x-regex": r"^(?P<content>[\s\S]*?)\s*(?P<tool_calls>(?:<tool_call>[\s\S]*?</tool_call>\s*)*)(?:<\|im_end\|>)?$",
    "properties": {
        "role": {"const": "assistant"},
        "content": {"type": "string"},
        "tool_calls": {
            "type": "array",
            "x-regex-iterator": r"<tool_call>\s*([\s\S]*?)\s*</tool_call>",
            "items": {
                "type": "object",
                "x-parser": "json",
                "x-parser-args": {"transform": "{type: 'function', function: @}"},
                "properties": {"type": {"const": "function"}, "function": {"type": "object"}},
            },
        },
    },
}
"""How transformers finds the calls of a turn, in the Hermes convention."""


def recipe_for(folder: Path, *overrides: str) -> Any:
    """The quickstart's recipe with this benchmark's sizes; its runs live in ``folder``."""
    from retool.config import load_recipe, recipe_path

    settings = [
        f'run.out="{folder}"',
        f"run.seed={SEED}",
        f"rollout.max_response_tokens={RESPONSE_TOKENS}",
        f"rl.prompts={PROMPTS}",
        f"rl.group_size={SAMPLES}",
        f"rl.micro_batch_tokens={MICRO_BATCH_TOKENS}",
        f"rl.optim.lr={LEARNING_RATE}",
        "rl.optim.warmup_steps=0",
    ]
    return load_recipe(recipe_path("quickstart"), [*settings, *overrides])


def peak_rss_mb() -> float:
    """Of this process since it started its program (``ru_maxrss`` would count what the parent held when it forked)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


# The checkpoint


def lengthen_prompts(tokenizer: Any) -> None:
    """Put words before the tool's introduction, until the tokens that all prompts share are ``COMMON_TOKENS``."""
    from retool.algo.batch import common_prefix
    from retool.data.world import make_tasks
    from retool.formats.hermes import HermesFormat

    template = tokenizer.chat_template
    if TOOL_INTRODUCTION not in template:
        raise SystemExit("nano's chat template has changed: TOOL_INTRODUCTION no longer occurs in it")
    tasks = make_tasks("train", PROMPTS, SEED)
    words = PADDING.split(" ")
    for count in range(1000):
        padding = "\\n\\n" + " ".join(words[i % len(words)] for i in range(count))
        tokenizer.chat_template = template.replace(TOOL_INTRODUCTION, padding + TOOL_INTRODUCTION)
        fmt = HermesFormat(tokenizer)
        if common_prefix([fmt.prompt_ids(task.messages) for task in tasks]) >= COMMON_TOKENS:
            return
    raise SystemExit(f"the prompts' common prefix does not reach {COMMON_TOKENS} tokens")


def prepare(folder: Path, sft_steps: int, layers: int) -> Path:
    """Fine-tune nano's first ``layers`` layers on demonstrations, half of which run code; returns the checkpoint."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from retool import sft
    from retool.engine.model import NANO
    from retool.engine.runtime import load_runtime
    from retool.formats.tokenizer import load_tokenizer
    from retool.progress import Progress
    from retool.store import RunFolder

    config = AutoConfig.from_pretrained(NANO)
    config.num_hidden_layers, config.layer_types = layers, config.layer_types[:layers]
    tokenizer = load_tokenizer(str(NANO))
    lengthen_prompts(tokenizer)
    base = folder / "base"
    AutoModelForCausalLM.from_pretrained(NANO, config=config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    recipe = recipe_for(folder, f'model.path="{base}"', f"sft.steps={sft_steps}", f"data.sft_tool_share={TOOL_SHARE}")
    return Path(sft.train(load_runtime(recipe), RunFolder(folder / "sft"), progress=Progress())["checkpoint"])


# Our side


def run_ours(args: argparse.Namespace) -> dict[str, Any]:
    from retool import rl
    from retool.engine.runtime import load_runtime, open_sandbox
    from retool.progress import Progress
    from retool.store import RunFolder

    cpu_s: list[float] = []

    class Watched(RunFolder):
        """The seam at which every step passes once, near its end."""

        def write_step(self, step: int, groups: Any) -> Path:
            written = super().write_step(step, groups)
            cpu_s.append(time.process_time())
            return written

    with tempfile.TemporaryDirectory() as out:
        recipe = recipe_for(Path(out), f"rl.steps={args.steps}", f"run.threads={args.threads}")
        folder = Watched(Path(out) / "ours")

        async def job() -> None:
            async with open_sandbox(recipe) as sandbox:
                await rl.train(load_runtime(recipe, args.model), folder, sandbox, progress=Progress(quiet=True))

        asyncio.run(job())
        steps = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    result: dict[str, Any] = defaultdict(list, cpu_s=[b - a for a, b in pairwise(cpu_s)])
    for step in steps[1:]:  # the first one warms up
        result["step_s"].append(step["timing_s/step"])
        result["rollout_s"].append(step["timing_s/rollout"] + step["timing_s/grade"])
        result["training_s"].append(step["timing_s/train"])
        result["calls"].append(step["tool/calls_per_trajectory"])
        result["sampled"].append(step["tokens/sampled"] / (PROMPTS * SAMPLES))
        result["right"].append(step["acc/mean"])
    return result


# TRL's side


class Clock:
    """Seconds by part since the last ``lap``."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = defaultdict(float)

    def run(self, part: str, function: Any, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            self.parts[part] += time.perf_counter() - began

    def lap(self) -> dict[str, float]:
        parts, self.parts = self.parts, defaultdict(float)
        return parts


class BackgroundLoop:
    """An event loop in a thread of its own, for a synchronous tool over our asynchronous sandbox."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def wait(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()


def trl_settings(args: argparse.Namespace, out: str, recipe: Any) -> Any:
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=out,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        seed=SEED,
        max_steps=args.steps,
        per_device_train_batch_size=args.trl_batch,
        gradient_accumulation_steps=PROMPTS * SAMPLES // args.trl_batch,
        num_generations=SAMPLES,
        num_iterations=1,
        beta=0.0,
        loss_type="dapo",
        epsilon=recipe.rl.clip_low,
        epsilon_high=recipe.rl.clip_high,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=recipe.rl.optim.grad_clip,
        max_completion_length=RESPONSE_TOKENS,
        max_tool_calling_iterations=recipe.rollout.max_turns - 1,
        temperature=recipe.rollout.temperature,
        top_p=1.0,
        top_k=0,
        shuffle_dataset=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def make_tool(clock: Clock, background: BackgroundLoop, sandbox: Any, fmt: Any, recipe: Any) -> Any:
    def code_interpreter(code: str) -> str:
        """Run Python code and see what it prints.

        Args:
            code: The program.
        """
        result = clock.run("tools", background.wait, sandbox.execute(code, recipe.sandbox.timeout_s))
        shown: str = fmt.truncate(result.text, recipe.rollout.max_observation_tokens)
        return shown

    return code_interpreter


def reward(completions: list[list[dict[str, Any]]], answer: list[str], **kwargs: Any) -> list[float]:
    """Our grader's verdict on each trajectory's last assistant message, as the paper rewards it."""
    from retool.grading.answers import extract_answer
    from retool.grading.equivalence import equivalent
    from retool.grading.rewards import paper
    from retool.types import Grade

    rewards = []
    for messages, truth in zip(completions, answer, strict=True):
        last = messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""
        prediction = extract_answer(last)
        rewards.append(paper(Grade(equivalent(prediction, truth), prediction)))
    return rewards


def make_trainer_class(clock: Clock, fmt: Any) -> Any:
    from trl import GRPOTrainer

    class TimedTrainer(GRPOTrainer):  # type: ignore[misc]
        """GRPOTrainer with a watch, and with our prompts: the tool's schema that it would derive from the function is
        worded differently from the one that the checkpoint was fine-tuned on."""

        def _tokenize_prompts(self, prompts: list[Any]) -> Any:
            return [fmt.prompt_ids(prompt) for prompt in prompts], None, {}

        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            return clock.run("generation", super()._generate_single_turn, *args, **kwargs)

        def _generate_and_score_completions(self, *args: Any, **kwargs: Any) -> Any:
            return clock.run("rollout", super()._generate_and_score_completions, *args, **kwargs)

    return TimedTrainer


def run_trl(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback

    from retool.data.sources import open_source
    from retool.formats.hermes import HermesFormat
    from retool.formats.tokenizer import load_tokenizer
    from retool.sandbox import LocalSandbox

    if args.threads:
        torch.set_num_threads(args.threads)
    clock, background, laps = Clock(), BackgroundLoop(), []

    class Laps(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.began, self.cpu_began = time.perf_counter(), time.process_time()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            now, cpu = time.perf_counter(), time.process_time()
            laps.append({**clock.lap(), "step": now - self.began, "cpu": cpu - self.cpu_began})
            self.began, self.cpu_began = now, cpu

    with tempfile.TemporaryDirectory() as out:
        recipe = recipe_for(Path(out))
        tokenizer = load_tokenizer(str(args.model))
        tokenizer.response_schema = RESPONSE_SCHEMA
        fmt = HermesFormat(tokenizer)
        tasks = open_source(recipe).train_tasks(0, args.steps * PROMPTS)
        sandbox = LocalSandbox(recipe.sandbox)
        background.wait(sandbox.start())
        try:
            trainer = make_trainer_class(clock, fmt)(
                model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
                processing_class=tokenizer,
                args=trl_settings(args, out, recipe),
                train_dataset=Dataset.from_list([{"prompt": t.messages, "answer": t.answer} for t in tasks]),
                reward_funcs=reward,
                tools=[make_tool(clock, background, sandbox, fmt, recipe)],
                callbacks=[Laps()],
            )
            trainer.train()
        finally:
            background.wait(sandbox.close())
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    result: dict[str, Any] = defaultdict(list)
    for lap, log in list(zip(laps, logs, strict=True))[1:]:  # the first one warms up
        result["step_s"].append(lap["step"])
        result["cpu_s"].append(lap["cpu"])
        result["rollout_s"].append(lap["rollout"])
        result["generation_s"].append(lap["generation"])
        result["tools_s"].append(lap.get("tools", 0.0))
        result["training_s"].append(lap["step"] - lap["rollout"])
        result["calls"].append(log["tools/call_frequency"])
        result["sampled"].append(log["completions/mean_length"])
        result["right"].append((log["reward"] + 1) / 2)
    return result


# The comparison


def run_side(side: str, python: str, args: argparse.Namespace, model: Path | None) -> Any:
    """A fresh process for one side; its result, and its output only if it fails."""
    command = [python, __file__, "--side", side, "--steps", str(args.steps), "--threads", str(args.threads)]
    command += ["--trl-batch", str(args.trl_batch), "--sft-steps", str(args.sft_steps), "--layers", str(args.layers)]
    command += ["--work", str(args.work)] + (["--model", str(model)] if model else [])
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
    if done.returncode or not lines:
        raise SystemExit(f"{side} failed ({done.returncode}):\n{done.stdout[-2000:]}{done.stderr[-6000:]}")
    return json.loads(lines[-1].removeprefix(RESULT))


ROWS = (
    ("seconds a step", "step_s", "{:.2f}"),
    ("  rollout, code and reward", "rollout_s", "{:.2f}"),
    ("    generation", "generation_s", "{:.2f}"),
    ("    code", "tools_s", "{:.2f}"),
    ("  training", "training_s", "{:.2f}"),
    ("CPU seconds a step", "cpu_s", "{:.2f}"),
    ("peak RSS, MB", "peak_rss_mb", "{:.0f}"),
    ("runs of code a trajectory", "calls", "{:.2f}"),
    ("sampled tokens a trajectory", "sampled", "{:.1f}"),
    ("right answers", "right", "{:.2f}"),
)


def median(results: list[dict[str, Any]], name: str) -> float | None:
    """Over every step of every round; None for what a side does not report (ours runs code while it samples)."""
    values = [value for result in results for value in result.get(name, [])]
    return statistics.median(values) if values else None


def show(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    print(f"\n{'median':30}{'ReTool':>10}{'TRL':>10}{'ratio':>8}")
    for label, name, form in ROWS:
        a, b = median(ours, name), median(theirs, name)
        cells = [form.format(value) if value is not None else "–" for value in (a, b)]
        ratio = f"{b / a:.2f}" if a and b else ""
        print(f"{label:30}{cells[0]:>10}{cells[1]:>10}{ratio:>8}")
    seconds, memory = median(ours, "step_s") or 0.0, median(ours, "peak_rss_mb") or 0.0
    for name, value, goal in (("seconds a step", seconds, GOAL_S), ("peak RSS, MB", memory, GOAL_MB)):
        print(f"goal for ours: {name} ≤ {goal:g}: {'met' if value <= goal else 'MISSED'} ({value:.4g})")


def compare(args: argparse.Namespace) -> None:
    model = args.model
    if model is None:
        print(f"fine-tuning {args.layers} layers of nano for {args.sft_steps} steps …", flush=True)
        model = Path(run_side("prepare", sys.executable, args, None)["checkpoint"])
    results: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
    for number in range(args.rounds):
        for side, python in (("ours", sys.executable), ("trl", args.trl_python)):
            if python is None:
                continue
            results[side].append(run_side(side, python, args, model))
            last = results[side][-1:]
            seconds, cpu, memory = (median(last, name) for name in ("step_s", "cpu_s", "peak_rss_mb"))
            print(f"round {number + 1}  {side:5} {seconds:6.2f} s a step ({cpu:.2f} CPU)  {memory:5.0f} MB", flush=True)
    show(results["ours"], results["trl"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--trl-python", help="python of the environment made with requirements-trl.txt; none: ours only"
    )
    parser.add_argument("--model", type=Path, help="checkpoint for both sides; none: fine-tune nano first")
    parser.add_argument("--sft-steps", type=int, default=100)
    parser.add_argument("--layers", type=int, default=LAYERS, help="nano's layers that are kept")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="RL steps of a process; the first is not counted")
    parser.add_argument("--threads", type=int, default=0, help="torch's CPU threads; 0: each side's own choice")
    parser.add_argument(
        "--trl-batch", type=int, default=TRL_BATCH, help="TRL's per_device_train_batch_size; divides 256"
    )
    parser.add_argument("--side", choices=["prepare", "ours", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side == "prepare":
        print(RESULT + json.dumps({"checkpoint": str(prepare(args.work, args.sft_steps, args.layers))}))
    elif args.side:
        result = (run_ours if args.side == "ours" else run_trl)(args)
        print(RESULT + json.dumps({**result, "peak_rss_mb": [peak_rss_mb()]}))
    else:
        with tempfile.TemporaryDirectory() as work:
            args.work = Path(work)
            compare(args)


if __name__ == "__main__":
    main()
