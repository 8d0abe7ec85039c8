"""verl's sampling servers as a ``Policy``."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from retool.types import Finish, SamplingParams, TokenOutput

_log = logging.getLogger(__name__)
KEEP_STOP = {"vllm": {"include_stop_str_in_output": True}, "sglang": {"no_stop_trim": True}}
"""How each server is told that the string that ends a turn is a part of the turn."""


class ServerPolicy:
    """``protocols.Policy`` of one trajectory, over the client that verl gives to an agent loop. The servers keep a
    session's cache by themselves and forget it as others need the room.

    Args:
        client: verl's ``LLMServerClient``.
        decode: text of token ids; tells a turn that a stop string ended from one that was cut off, which verl does not.
        name: who asks, unique among all trajectories of the step.
        server: ``vllm`` or ``sglang``.
    """

    def __init__(self, client: Any, decode: Callable[[list[int]], str], *, name: str, server: str) -> None:
        self._client, self._decode, self._name = client, decode, name
        self._keep_stop = KEEP_STOP[server]
        self.seconds = 0.0
        """How long the servers have taken."""
        self.preempted = 0
        self.newest = 0
        """The newest weights that sampled any of its tokens, by verl's number."""

    async def generate(self, ids: list[int], params: SamplingParams, *, session: str) -> TokenOutput:
        """See ``protocols.Policy``. ``params.seed`` is not passed on: the servers' batches have random numbers of their
        own. Log-probabilities are the server's ``processed_logprobs``: of softmax(logits / temperature), and where
        top-k or top-p cut the distribution, of what they left."""
        options = {
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k or -1,
            "max_tokens": params.max_tokens,
            "repetition_penalty": 1.0,
            "logprobs": True,
            "stop_token_ids": list(params.stop_token_ids),
        }
        if params.stop:
            options |= {"stop": list(params.stop), **self._keep_stop}
        started = time.monotonic()
        try:
            output = await self._client.generate(
                request_id=f"{self._name}/{session}", prompt_ids=list(ids), sampling_params=options
            )
        except Exception as error:  # whatever a server of others' making raises, the model has not done it
            _log.warning("%s: the sampling server failed: %s", self._name, error)
            return TokenOutput([], [], Finish.ABORT)
        self.seconds += time.monotonic() - started
        self.preempted += output.num_preempted or 0
        tokens = [int(token) for token in output.token_ids]
        more = output.extra_fields
        step = more.get("global_steps")
        self.newest = max(self.newest, int(more.get("max_global_steps", step) or 0))
        return TokenOutput(
            token_ids=tokens,
            logprobs=[float(value) for value in output.log_probs or ()],
            finish=self._finish(output.stop_reason, tokens, params),
            policy_version=int(more.get("min_global_steps", step) or 0),
        )

    def _finish(self, reason: str | None, tokens: list[int], params: SamplingParams) -> Finish:
        """verl says ``completed`` for a turn that ended and for one that was cut off alike."""
        if reason in ("aborted", "abort") or not tokens:
            return Finish.ABORT
        if len(tokens) < params.max_tokens or tokens[-1] in params.stop_token_ids:
            return Finish.STOP
        text = self._decode(tokens) if params.stop else ""
        return Finish.STOP if any(stop in text for stop in params.stop) else Finish.LENGTH

    def release(self, session: str) -> None:
        """Nothing is kept here."""

    def interrupt(self) -> None:
        """Never called: verl's trainers pause the servers, not the trajectories."""
        raise NotImplementedError("verl's servers are paused by verl")
