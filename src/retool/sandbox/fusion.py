"""SandboxFusion's HTTP messages as types, and what they mean in ours. The server and the client share them.

Fields that SandboxFusion does not know are marked *ours*: its clients ignore them in answers, and our client sends them
only where they are needed.
"""

from __future__ import annotations

import base64
import binascii
import re
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from retool.types import Execution, ExecutionResult, ExecutionStatus

MAX_CELLS = 1000
"""Of one notebook: far more than one has, and it bounds the answer."""
MAX_SESSION_NAME = 1024
_SHOWN_CHARS = 100
"""Of a wrong value in a message."""


class Base64Error(ValueError):
    """The content of a file is not base64."""


def _only_python(language: str) -> str:
    if language != "python":
        shown = language[:_SHOWN_CHARS]
        raise PydanticCustomError("language", "language = {value}: supported here: 'python'", {"value": repr(shown)})
    return language


Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
SecondsOrNone = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid")

    memory_limit_MB: int = -1
    """-1: the server's own limit."""
    files: dict[str, str | None] = Field(default_factory=dict)
    """base64 by name; a file that is null is left out, as SandboxFusion does."""
    fetch_files: list[str] = Field(default_factory=list)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any) -> Any:
        """pydantic takes ``true`` for 1; no field here is a truth value."""
        if isinstance(value, bool):
            raise PydanticCustomError("no_bool", "Input should not be true or false")
        return value

    @field_validator("memory_limit_MB")
    @classmethod
    def _memory(cls, value: int) -> int:
        if value != -1 and value < 1:
            raise PydanticCustomError("memory_limit", "give at least 1, or -1 for the server's own limit")
        return value

    @property
    def memory_mb(self) -> int | None:
        return None if self.memory_limit_MB == -1 else self.memory_limit_MB

    def decoded_files(self) -> dict[str, bytes]:
        """Raises: Base64Error."""
        return {name: _decode(name, content) for name, content in self.files.items() if content is not None}


class RunCodeRequest(Request):
    code: str
    language: Annotated[str, AfterValidator(_only_python)]
    compile_timeout: SecondsOrNone = 10.0
    """Taken and not used: Python is not compiled ahead."""
    run_timeout: Seconds = 10.0
    stdin: str | None = None
    args: list[str] = Field(default_factory=list, max_length=0)
    """SandboxFusion hands them to pytest alone."""
    session: str = Field(default="", max_length=MAX_SESSION_NAME)
    """Ours: go on in the interpreter of this name."""


class RunJupyterRequest(Request):
    cells: list[str] = Field(max_length=MAX_CELLS)
    cell_timeout: SecondsOrNone = 0.0
    """0: none but the total."""
    total_timeout: Seconds = 45.0
    kernel: Literal["python3"] = "python3"


class EndSessionRequest(BaseModel):
    """Ours."""

    model_config = ConfigDict(extra="forbid")
    session: str = Field(min_length=1, max_length=MAX_SESSION_NAME)


class RunStatus(StrEnum):
    SUCCESS = "Success"
    FAILED = "Failed"
    SANDBOX_ERROR = "SandboxError"


class CommandStatus(StrEnum):
    FINISHED = "Finished"
    ERROR = "Error"
    TIME_LIMIT_EXCEEDED = "TimeLimitExceeded"


class CommandResult(BaseModel):
    status: CommandStatus
    execution_time: float | None = None
    """Seconds."""
    return_code: int | None = None
    stdout: str | None = None
    stderr: str | None = None
    truncated: bool | None = None
    """Ours, as is the next; None where the service does not say."""
    retool_status: ExecutionStatus | None = None


class Answer(BaseModel):
    status: RunStatus
    message: str = ""
    executor_pod_name: str | None = None
    files: dict[str, str] = Field(default_factory=dict)
    not_fetched: dict[str, str] = Field(default_factory=dict)
    """Ours, as is the next: why a file could not be brought back, by name."""
    tier: str = ""


class RunCodeAnswer(Answer):
    compile_result: CommandResult | None = None
    run_result: CommandResult | None = None


class Cell(BaseModel):
    stdout: str
    stderr: str
    display: list[dict[str, Any]] = Field(default_factory=list)
    error: list[dict[str, Any]] = Field(default_factory=list)
    """``{"ename", "evalue", "traceback"}`` of what the cell raised."""
    retool_status: ExecutionStatus
    """Ours."""


class RunJupyterAnswer(Answer):
    driver: CommandResult | None = None
    cells: list[Cell] = Field(default_factory=list)


def _decode(name: str, content: str) -> bytes:
    try:
        return base64.b64decode("".join(content.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Base64Error(f"files[{name[:_SHOWN_CHARS]!r}] is not base64: {error}") from None


def encode_files(execution: Execution) -> dict[str, str]:
    return {name: base64.b64encode(content).decode("ascii") for name, content in execution.files.items()}


# Ours to theirs.

_COMMAND_STATUS = {
    ExecutionStatus.TIMEOUT: CommandStatus.TIME_LIMIT_EXCEEDED,
    ExecutionStatus.OUTPUT_LIMIT: CommandStatus.ERROR,
}
_MESSAGES = {
    ExecutionStatus.MEMORY: "the code ran out of memory",
    ExecutionStatus.OUTPUT_LIMIT: "the code wrote more output than is allowed: it was ended, and its output cut",
}


def pod_name(tier: str) -> str:
    return f"retool-{tier}"


def command_result(result: ExecutionResult) -> CommandResult:
    """Any ending but INFRA, which has no place in SandboxFusion's answers and is HTTP 503."""
    return CommandResult(
        status=_COMMAND_STATUS.get(result.status, CommandStatus.FINISHED),
        execution_time=result.duration_s,
        return_code=result.exit_code,
        stdout=result.stdout,
        stderr=result.stderr,
        truncated=result.truncated,
        retool_status=result.status,
    )


def run_answer(execution: Execution, tier: str) -> RunCodeAnswer:
    result = execution.result
    return RunCodeAnswer(
        status=RunStatus.SUCCESS if result.status is ExecutionStatus.OK else RunStatus.FAILED,
        message=_MESSAGES.get(result.status, ""),
        run_result=command_result(result),
        executor_pod_name=pod_name(tier),
        files=encode_files(execution),
        not_fetched=dict(execution.not_fetched),
        tier=tier,
    )


# Theirs to ours.

_MEMORY_ERROR = re.compile(r"(\w+\.)*(_Array)?MemoryError(:.*)?")
"""The last line of a traceback; numpy's is ``numpy._core._exceptions._ArrayMemoryError``."""


def result_of(answer: RunCodeAnswer) -> ExecutionResult:
    """Nothing is lost of an answer of our own server; from another service the ending is read off status and code."""
    run = answer.run_result
    if answer.status is RunStatus.SANDBOX_ERROR or run is None:
        return infra(f"the service failed: {answer.message or 'its answer has no run_result'}")
    stdout, stderr = run.stdout or "", run.stderr or ""
    status = run.retool_status or _status_of(run, stderr)
    if status is ExecutionStatus.INFRA:
        return infra(stderr or answer.message or "the service could not run the code")
    exit_code = None if status is ExecutionStatus.TIMEOUT else run.return_code
    return ExecutionResult(
        status, stdout, stderr, exit_code, run.execution_time or 0.0, bool(run.truncated), tier=answer.tier
    )


def _status_of(run: CommandResult, stderr: str) -> ExecutionStatus:
    if run.status is CommandStatus.TIME_LIMIT_EXCEEDED:
        return ExecutionStatus.TIMEOUT
    if run.status is CommandStatus.ERROR or run.return_code is None:
        return ExecutionStatus.INFRA
    if run.return_code == 0:
        return ExecutionStatus.OK
    if run.return_code < 0:
        return ExecutionStatus.KILLED
    last_line = stderr.rstrip().rsplit("\n", 1)[-1]
    return ExecutionStatus.MEMORY if _MEMORY_ERROR.fullmatch(last_line) else ExecutionStatus.ERROR


def infra(reason: str) -> ExecutionResult:
    return ExecutionResult(ExecutionStatus.INFRA, stderr=reason)
