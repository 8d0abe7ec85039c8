"""Clients that others wrote, against ``retool sandbox serve`` in a process of its own."""

from __future__ import annotations

import asyncio
import importlib.util
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import sandbox_fusion
from served import serving

VERL = "verl==0.9.1"
VERL_CLIENT = "verl/utils/reward_score/sandbox_fusion/utils.py"
DOWNLOAD_S = 120


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving("--workers", "4", "--timeout", "60", "--preload", "math") as (_, address):
        yield address


def code(text: str, **fields: Any) -> sandbox_fusion.RunCodeRequest:
    return sandbox_fusion.RunCodeRequest(code=text, language="python", **fields)


def test_run_code_of_sandbox_fusion(url: str) -> None:
    def run(text: str, **fields: Any) -> sandbox_fusion.RunCodeResponse:
        return sandbox_fusion.run_code(code(text, **fields), endpoint=url, max_attempts=1, client_timeout=60)

    good = run("print(input() + open('a').read())", stdin="é\n", files={"a": "YQ==", "b": None})
    assert (good.status, good.run_result.status) == ("Success", "Finished")
    assert (good.run_result.stdout, good.run_result.return_code) == ("éa\n", 0)
    bad = run("import sys; sys.stderr.write('no'); sys.exit(3)")
    assert (bad.status, bad.run_result.return_code, bad.run_result.stderr) == ("Failed", 3, "no")
    slow = run("while True: pass", run_timeout=0.5)
    assert (slow.status, slow.run_result.status, slow.run_result.return_code) == ("Failed", "TimeLimitExceeded", None)
    made = run("open('out.bin', 'wb').write(b'x')", fetch_files=["out.bin"])
    assert made.files == {"out.bin": "eA=="}
    summary = sandbox_fusion.SummaryMapping(RunTimeout="too slow", RunFailed="failed")
    said = [sandbox_fusion.summary_run_code_result(r, summary) for r in (good, bad, slow)]
    assert said == ["Success", "failed", "too slow"]
    with pytest.raises(Exception, match="422"):
        sandbox_fusion.run_code(
            sandbox_fusion.RunCodeRequest(code="1", language="cpp"), endpoint=url, max_attempts=1, client_timeout=60
        )
    with pytest.raises(Exception, match="is not base64"):
        run("1", files={"a": "%%"})


def test_run_code_async_of_sandbox_fusion(url: str) -> None:
    async def whole() -> list[Any]:
        calls = (
            sandbox_fusion.run_code_async(code(f"print({n})"), endpoint=url, max_attempts=1, client_timeout=60.0)
            for n in range(20)
        )
        return await asyncio.gather(*calls)

    assert [r.run_result.stdout for r in asyncio.run(whole())] == [f"{n}\n" for n in range(20)]


NOTEBOOK = sandbox_fusion.RunJupyterRequest(cells=["a = 'hello'", "assert False", "print(a)"])


def check_notebook(found: sandbox_fusion.RunJupyterResponse) -> None:
    assert (found.status, found.driver.status) == ("Success", "Finished")
    assert found.cells[1].error[0]["ename"] == "AssertionError"
    assert [cell.stdout for cell in found.cells] == ["", "", "hello\n"]


def test_run_jupyter_of_sandbox_fusion(url: str) -> None:
    check_notebook(sandbox_fusion.run_jupyter(NOTEBOOK, endpoint=url, max_attempts=1, client_timeout=60))


def test_run_jupyter_async_of_sandbox_fusion(url: str) -> None:
    call = sandbox_fusion.run_jupyter_async(NOTEBOOK, endpoint=url, max_attempts=1, client_timeout=60.0)
    check_notebook(asyncio.run(call))


@pytest.fixture(scope="module")
def verl_client(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The one module of verl's wheel that talks to a sandbox; it needs nothing of verl, which needs a great deal."""
    folder = tmp_path_factory.mktemp("verl")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--dest",
        folder,
        VERL,
    ]
    try:
        found = subprocess.run(pip, capture_output=True, text=True, timeout=DOWNLOAD_S, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{VERL} could not be downloaded within {DOWNLOAD_S} s")
    wheels = list(folder.glob("verl-*.whl"))
    if not wheels:
        pytest.skip(f"{VERL} could not be downloaded: {found.stderr.strip()[-300:]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        path = Path(wheel.extract(VERL_CLIENT, folder))
    spec = importlib.util.spec_from_file_location("verl_sandbox_client", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_verls_call(url: str, verl_client: ModuleType) -> None:
    def call(text: str, timeout: int = 20, memory: int = 512, **options: Any) -> tuple[Any, str | None]:
        answer: tuple[Any, str | None] = verl_client.call_sandbox_api(
            url + "/run_code", text, "typed", timeout, timeout, memory, **options
        )
        return answer

    answer, error = call("print(input())")
    assert error is None
    assert (answer["status"], answer["run_result"]["stdout"]) == ("Success", "typed\n")
    assert answer["run_result"]["status"] == "Finished"
    answer, _ = call("1 / 0")
    assert (answer["status"], answer["run_result"]["return_code"]) == ("Failed", 1)
    answer, _ = call("while True: pass", timeout=1)
    assert answer["run_result"]["status"] == "TimeLimitExceeded"
    answer, error = call("int main() {}", language="cpp")
    assert answer is None and "422" in str(error)


def test_verls_verdicts(url: str, verl_client: ModuleType) -> None:
    """Its own classes: True right, False wrong, −2 runtime error, −3 timeout."""
    verdicts = {
        "print(int(input()) * 2)": [True, False],
        "1 / 0": [-2, -2],
        "while True: pass": [-3, -3],
        "import os; os.kill(os.getpid(), 11)": [-2, -2],
        "print('x' * 10_000_000)": [-2, -2],
    }
    for text, expected in verdicts.items():
        tests = {"inputs": ["2", "3"], "outputs": ["4", "7"]}
        found, _ = verl_client.check_correctness(url + "/run_code", tests, text, timeout=2, memory_limit_mb=512)
        assert found == expected, text
