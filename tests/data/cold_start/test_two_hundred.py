"""Two hundred problems of GSM8K: counted as scripted, and killed at random moments."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from scripted import Say, Script, serving
from test_generate import run

from retool.data import gsm8k
from retool.data.conversations import read_conversations, with_answer_tags
from retool.data.problem import Problem
from retool.data.retool_sft import to_text
from retool.data.sets import load_problems
from tests.fakes import hear_ctrl_c


def lessons(shared_data: Path, folder: Path) -> tuple[list[Problem], dict[str, str], Path]:
    """The first 200 problems whose annotated solutions give a program, and a right answer with tags for each."""
    file = str(shared_data / "math" / "gsm8k_train.jsonl")
    problems = list(load_problems("gsm8k", file=file))[:260]
    by_id = {problem.id: problem for problem in problems}
    conversations = gsm8k.convert(problems)[0][:200]
    chosen = [by_id[c.id] for c in conversations]
    texts = {p.question: to_text(with_answer_tags(c).messages[2:]) for p, c in zip(chosen, conversations, strict=True)}
    path = folder / "chosen.jsonl"
    rows = [{"question": p.question, "answer": p.answer, "solution": p.solution} for p in chosen]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return chosen, texts, path


def scripted(chosen: list[Problem], texts: dict[str, str]) -> tuple[Script, dict[str, int]]:
    """Tenths: a reaction for each number modulo 10, and the counts that must come of them."""
    place = {p.question: n for n, p in enumerate(chosen)}

    def script(question: str, before: int) -> Say:
        right = texts[question]
        printed = right[right.index("<interpreter>\n") + len("<interpreter>\n") : right.index("\n</interpreter>")]
        return {
            0: Say(right[: right.rindex("\\boxed{")] + "\\boxed{-77}\n</answer>"),
            1: Say(right.replace("</code>", "", 1)),
            2: Say("In the head.\n\n" + right[right.index("<answer>") :]),
            3: Say(right.replace(f"\n{printed}\n", "\n987654\n", 1).replace("<answer>", "So 987654.\n<answer>")),
            4: Say(right.replace(f"\n{printed}\n", f"\n{printed}\ntook 31337 ns\n", 1)),
            5: Say(right.replace("```python\n", "```python\nimport no_such_module_at_all\n", 1)),
            6: Say(right, finish="length"),
            7: Say("busy", status=429, headers={"Retry-After": "0.01"}) if before == 0 else Say(right),
            8: Say("oh", status=500) if before == 0 else Say(right),
            9: Say(right, delay_s=0.02),
        }[place[question] % 10]

    rejected = {"answer: wrong": 20, "format: unclosed <code>": 20, "format: no code": 20, "execution: mismatch": 20,
                "execution: error": 20, "truncated": 20}  # fmt: skip
    return script, rejected


def test_two_hundred_problems_are_counted_as_scripted(shared_data: Path, tmp_path: Path) -> None:
    chosen, texts, path = lessons(shared_data, tmp_path)
    script, rejected = scripted(chosen, texts)
    with serving(script, chosen) as teacher:
        report = run(path, teacher.url, tmp_path / "o.parquet")
    assert dict(report.rejected) == rejected
    assert report.kept == 80 and report.answered == 200 and not report.failed
    assert report.code["outputs replaced"] == 20
    assert report.requests == 240
    for conversation in read_conversations(tmp_path / "o.parquet"):
        question = conversation.messages[1]["content"]
        assert to_text(conversation.messages[2:]).partition("took")[0].startswith(texts[question][:40])


def test_killed_at_random_moments_it_asks_for_nothing_twice_and_loses_nothing(
    shared_data: Path, tmp_path: Path
) -> None:
    """SIGKILL, again and again. Whatever answer reached the journal is never asked for again; of the requests that were
    under way at a kill the server cannot know whether they arrived, and those alone may be sent once more."""
    chosen, texts, path = lessons(shared_data, tmp_path)
    journal = tmp_path / "o.journal.jsonl"
    concurrency, kills = 8, 0
    rng = random.Random(time.time_ns())
    with serving(lambda q, _: Say(texts[q], delay_s=0.03), chosen) as teacher:
        command = [
            sys.executable, "-m", "retool.cli", "cold-start", str(path), "--out", str(tmp_path / "o.parquet"),
            "--teacher", teacher.url, "--model", "m", "--concurrency", str(concurrency), "--timeout-code", "5", "-q",
        ]  # fmt: skip
        while True:
            before = dict(teacher.asked)
            known = (
                {json.loads(line)["id"] for line in journal.read_bytes().split(b"\n")[1:-1]}
                if journal.exists()
                else set()
            )
            process = subprocess.Popen(command, preexec_fn=hear_ctrl_c, env={**os.environ, "PYTHONFAULTHANDLER": "1"})
            if kills < 3:
                while sum(teacher.asked.values()) == sum(before.values()) and process.poll() is None:
                    time.sleep(0.005)
                time.sleep(rng.uniform(0.0, 0.4))
                process.send_signal(signal.SIGKILL)
                kills += process.wait() != 0
            assert process.wait() in (0, -signal.SIGKILL)
            again = {
                f"chosen/{n}" for n, p in enumerate(chosen) if teacher.asked[p.question] > before.get(p.question, 0)
            }
            assert not again & known, "an answer that is on the disk was asked for again"
            if process.returncode == 0:
                break
    assert sum(teacher.asked.values()) <= 200 + kills * concurrency
    assert len(list(read_conversations(tmp_path / "o.parquet"))) == 200
    report = json.loads((tmp_path / "o.report.json").read_text())
    assert report["kept"] == report["answered"] == 200
