"""The report's page: whole, self-contained, escaped, and never stopped by what is missing."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from synthetic import OK, attempts, code_turn, make_group, make_task, make_trajectory, write_quickstart, write_rl_run

from retool.errors import UserError
from retool.metrics import evaluation_summary
from retool.report import write_report
from retool.report.load import Curve, load
from retool.report.page import duration, family_rows, number_tables, precise, stage_rows, story
from retool.store import RunFolder
from retool.types import ExecutionResult, TrajectoryGroup

VOID = {"meta", "br", "hr", "img", "input", "link", "path", "use", "rect", "circle", "line"}


class Page(HTMLParser):
    """Checks the nesting of elements and collects what a test asks about."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.faults: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.faults.append(tag)

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def words(self) -> str:
        return re.sub("[ \n]+", " ", " ".join(self.text))


def _whole(html: str) -> Page:
    page = Page(html)
    assert page.faults == [] and page.open == [], "elements must nest"
    return page


def _page(path: Path) -> Page:
    return _whole(write_report(path).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_quickstart(tmp_path_factory.mktemp("runs") / "quickstart", steps=12, problems=60).path


@pytest.fixture(scope="module")
def html(quickstart: Path) -> str:
    return write_report(quickstart).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return _whole(html)


def test_the_numbers_on_the_page_are_those_of_the_summary(quickstart: Path, page: Page) -> None:
    summary = RunFolder.open(quickstart).summary()
    for stage in ("base", "sft", "grpo", "text_only"):
        assert precise(summary[stage]["accuracy"]) in page.words
        low, high = summary[stage]["ci95"]
        assert f"{100 * low:.1f} – {100 * high:.1f}" in page.words
    assert "8 min 32 s" in page.words and "mul" in page.words


def test_the_page_needs_nothing_else(page: Page) -> None:
    loading = ("script", "link", "img", "iframe", "object", "embed", "base", "audio", "video")
    assert [tag for tag, _ in page.tags if tag in loading] == []
    policies = [a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv")]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            outside = name in ("src", "srcset", "data", "action", "poster") or "://" in (value or "")
            assert not outside or name.startswith("xmlns"), (tag, name, value)
            assert not name.endswith("href") or (value or "").startswith("#"), (tag, name, value)


def test_the_stylesheet_loads_nothing_and_knows_dark(html: str) -> None:
    style = "".join(re.findall(r"<style>(.*?)</style>", html, flags=re.DOTALL))
    assert "@import" not in style and "url(" not in style
    assert "prefers-color-scheme: dark" in html and "max-width: 700px" in html


def test_ids_are_unique_and_references_meet_them(page: Page) -> None:
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    wanted = {v.removeprefix("#") for _, a in page.tags for k, v in a.items() if k.endswith("href") and v}
    clips = {m for _, a in page.tags for v in a.values() for m in re.findall(r"url\(#([^)]+)\)", v or "")}
    labels = {a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a}
    assert wanted and clips and (wanted | clips | labels) <= set(ids)


def test_every_picture_says_what_it_shows(page: Page) -> None:
    labels = [a.get("aria-label") or "" for _, a in page.tags if a.get("role") == "img"]
    assert len(labels) == 11
    assert all("step" in label and len(label) > 30 for label in labels)
    assert any(label.startswith("Accuracy") and "GRPO: from" in label for label in labels)
    assert all(a.get("aria-hidden") == "true" for tag, a in page.tags if tag == "svg")


def test_colours_follow_the_page(html: str) -> None:
    drawn = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    assert set(re.findall(r"#[0-9a-fA-F]{6}\b", drawn)) == set(), "a fixed colour would vanish in one of the schemes"
    assert "var(--series-1)" in drawn and "var(--series-2)" in drawn


def test_the_same_run_makes_the_same_page(quickstart: Path, html: str) -> None:
    assert write_report(quickstart).read_text(encoding="utf-8") == html


NASTY = "</script><script>alert(1)</script></pre></style><b onmouseover='x'>&amp;{{ 7 * 7 }}]]>"


def _nasty_run(path: Path) -> Path:
    task = make_task(0, NASTY, NASTY, f"{NASTY}?")
    turns = [code_turn(NASTY, f'print("{NASTY}")  # {NASTY}', ExecutionResult(OK, NASTY + "\x00\x1b[31m", NASTY, 0))]
    group = TrajectoryGroup(task, [make_trajectory(task, 0, NASTY, turns)])
    wrong = TrajectoryGroup(task, [make_trajectory(task, 0, NASTY + "!", turns)])
    run = RunFolder(path)
    run.write_environment(seed=0, device=NASTY)
    run.write_eval("base", [wrong])
    run.write_eval("grpo", [group])
    run.write_summary({"base": evaluation_summary([wrong], 1, 100, 0), "grpo": evaluation_summary([group], 1, 100, 0)})
    return path


def test_what_a_model_wrote_cannot_break_the_page(tmp_path: Path) -> None:
    page = _page(_nasty_run(tmp_path / "run"))
    assert [tag for tag, _ in page.tags if tag in ("script", "b")] == ["b", "b"], "the two whiskers of the gauges"
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    text = "".join(page.text)
    assert text.count(NASTY) >= 8, "question, truth, prose, code, output, answer, device and family, as they are"
    assert "\x00" not in text and "\x1b" not in text and "␀␛[31m" in text


def test_a_run_of_reinforcement_learning_by_itself(tmp_path: Path) -> None:
    page = _page(write_rl_run(tmp_path / "single", 6, 0.9, 0.9).path)
    assert "Over 6 steps, accuracy on the training batch went from" in page.words
    assert "Step 1" in page.words and "Step 6" in page.words and "True answer" in page.words
    assert "By family" not in page.words and "Diamonds" not in page.words and "before and after" not in page.words


def test_an_evaluation_by_itself(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    groups = attempts(1, 12, 2, 0.8, 0.8)
    run.write_eval("test", groups)
    run.write_summary(evaluation_summary(groups, 2, 100, 0))
    words = _page(run.path).words
    assert "On 12 problems, test is right in" in words and "True answer" in words


def test_a_supervised_run_by_itself(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    tracker = run.tracker()
    tracker.log(1, {"train/loss": 2.0})
    tracker.log(2, {"train/loss": 1.5})
    tracker.close()
    assert "Cold start: loss" in _page(run.path).words


@pytest.mark.parametrize(
    "summary",
    [
        {},
        {"wall_seconds": None, "seed": None, "grpo": None, "base": 3},
        {"grpo": {}},
        {"grpo": {"accuracy": None, "ci95": None, "families": None, "num_turns": "x"}},
        {"grpo": {"accuracy": 0.5, "ci95": [0.4], "families": {"mul": None, "gcd": {"accuracy": None}}}},
        {"accuracy": True},
    ],
)
def test_what_is_missing_is_left_out(tmp_path: Path, summary: dict[str, Any]) -> None:
    run = RunFolder(tmp_path / "run")
    run.write_summary(summary)
    assert "ReTool report" in _page(run.path).words


@pytest.mark.parametrize("gone", ["sft", "grpo", "text_only", "trajectories", "summary.json", "environment.json"])
def test_any_part_may_be_missing(tmp_path: Path, gone: str) -> None:
    run = write_quickstart(tmp_path / "run", steps=3, problems=12)
    run.path.joinpath(gone).rename(tmp_path / "gone")
    assert "ReTool report" in _page(run.path).words


def test_steps_without_some_metrics_and_lost_steps(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    tracker = run.tracker()
    tracker.log(1, {"infra/trajectories": 8.0})
    tracker.log(2, {"acc/mean": 0.5, "acc/ci95_low": 0.4, "actor/entropy": float("nan")})
    tracker.log(3, {"acc/mean": 0.6, "training/rollout_logprob_gap_max": 0.0})
    tracker.close()
    run.write_step(2, [make_group(make_task(), [], infra=2)])
    assert "Entropy" not in _page(run.path).words


def test_no_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no run"):
        write_report(tmp_path / "nothing")


def test_the_story_names_the_stages_in_order(quickstart: Path) -> None:
    report = load(quickstart)
    told = story(report)
    assert told.startswith("On 60 problems, accuracy went from ")
    assert told.index("(base)") < told.index("(cold start) and ") < told.index("(GRPO); the model ran code on")
    assert "The same training without the tool reached" in told


def test_families_are_ranked_by_the_tool_user_not_by_the_control(quickstart: Path) -> None:
    stages = load(quickstart).stages
    ranks = [row.cells[2][0] for row in family_rows(stages) if row.cells[2]]
    assert [s.key for s in stages] == ["base", "sft", "grpo", "text_only"]
    assert ranks == sorted(ranks, reverse=True) and len(ranks) == 6
    assert [row.title for row in stage_rows(stages)] == ["Base", "Cold start", "GRPO", "Text-only GRPO"]


def test_a_long_run_is_thinned_and_keeps_its_last_step() -> None:
    curve = Curve("run", "Run", [{"step": float(n), "acc/mean": 0.5} for n in range(1, 402)])
    (table,) = number_tables([curve])
    assert table.columns == ["step", "accuracy"] and len(table.rows) <= 42
    assert table.rows[0][0] == "1" and table.rows[-1][0] == "401"


@pytest.mark.parametrize(
    "seconds,said", [(4.6, "5 s"), (59.7, "1 min 00 s"), (512.4, "8 min 32 s"), (7260, "2 h 01 min")]
)
def test_durations_read_like_speech(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_matplotlib_is_loaded_only_to_draw() -> None:
    program = "import sys, retool.report; sys.exit('matplotlib' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
