"""A rollout server for verl in place of vLLM, for tests: a transformers model on the CPU, sampled by our own engine.

It registers itself *as* ``vllm``, so that a product config with ``actor_rollout_ref.rollout.name=vllm`` runs unchanged.
``CPUServer`` answers the calls that verl 0.9.1 makes of ``vLLMHttpServer``, with vLLM's meaning: eos always stops,
what ends a turn is kept in its tokens, stop and length are both ``completed``, a prompt that leaves no room is an
error, an unknown sampling parameter too. All requests in flight share ``LocalPolicy``'s batch.

Two differences remain. ``log_probs`` are those before top-k and top-p (vLLM's ``processed_logprobs`` come after), which
is the same wherever neither is used. And there is no HTTP endpoint, only the actor's handle.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import ray
import torch
from verl.workers.rollout.base import _ROLLOUT_REGISTRY, BaseRollout
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput

from retool.types import Finish, SamplingParams

NAME = "vllm"
KV_BUDGET_MB = 512
NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "logprobs": (True, False, None),
    "include_stop_str_in_output": (True, False),
    "repetition_penalty": (1.0,),
    "ignore_eos": (False,),
}
"""Parameters that change no token as long as they have one of these values. ``include_stop_str_in_output`` never does:
it is about vLLM's text, and verl reads its tokens only."""


def sampling_params(given: dict[str, Any], *, limit: int, eos: tuple[int, ...], seed: int) -> SamplingParams:
    """verl's dictionary as ours. ``limit``: tokens at most; ``seed``: where none is given.

    Raises:
        ValueError: a parameter that vLLM does not have, or that has a meaning here which our engine cannot give it.
    """
    known = {"temperature", "top_p", "top_k", "max_tokens", "stop", "stop_token_ids", "seed"}
    for name, value in given.items():
        if name not in known and value not in NO_EFFECT.get(name, ()):
            raise ValueError(f"sampling parameter {name} = {value!r}: not supported by the CPU rollout")
    stop = given.get("stop") or ()
    wanted = given.get("seed")
    return SamplingParams(
        temperature=float(given.get("temperature", 1.0)),
        top_p=float(given.get("top_p", 1.0)),
        top_k=max(0, int(given.get("top_k", 0))),
        max_tokens=max(1, min(limit, int(given.get("max_tokens", limit)))),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stop_token_ids=(*eos, *(given.get("stop_token_ids") or ())),
        seed=seed if wanted is None else int(wanted),
    )


def _as_tuple(ids: int | list[int] | None) -> tuple[int, ...]:
    return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)


class CPUServer:
    """One replica's model, as a Ray actor. Every method that touches the model is a coroutine: Ray runs them on one
    event loop, which is what ``LocalPolicy`` asks for."""

    def __init__(self, path: str, config: Any, replica_rank: int):
        self._path, self._config = path, config
        # Requests without a seed must differ from each other, also in a group of the same prompt.
        self._seeds = random.Random(f"{config.seed} {replica_rank}")
        self._global_steps: int | None = None
        self._open = asyncio.Event()
        self._rejecting = False
        self._live: set[str] = set()

    async def launch(self) -> None:
        """Load the model and wait for requests."""
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

        from retool.engine.policy import LocalPolicy

        torch.set_num_threads(1)
        architecture = AutoConfig.from_pretrained(self._path)
        if self._config.load_format == "dummy":  # random weights, as vLLM's: the first weight sync brings the real ones
            self._model = AutoModelForCausalLM.from_config(architecture, dtype=torch.float32)
        else:
            self._model = AutoModelForCausalLM.from_pretrained(self._path, dtype=torch.float32)
        self._model.requires_grad_(False)
        tokenizer = AutoTokenizer.from_pretrained(self._path)
        try:
            generation = GenerationConfig.from_pretrained(self._path)
        except OSError:
            generation = self._model.generation_config
        self._eos = tuple({*_as_tuple(generation.eos_token_id), *_as_tuple(tokenizer.eos_token_id)})
        self._max_model_len = self._config.max_model_len or architecture.max_position_embeddings
        self._policy = LocalPolicy(
            self._model,
            decode=tokenizer.decode,
            kv_budget_mb=KV_BUDGET_MB,
            max_live=self._config.max_num_seqs,
            max_context=self._max_model_len,
        )
        self._open.set()

    async def generate(
        self, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str, **unused: Any
    ) -> TokenOutput:
        """One turn. Its session ends with it, as verl gives each turn an id of its own.

        Raises:
            ValueError: the prompt leaves no room, or a sampling parameter is not supported.
        """
        while not self._open.is_set():
            if self._rejecting:
                return self._output([], [], Finish.ABORT)
            await self._open.wait()
        prompt_ids = [int(i) for i in prompt_ids]
        room = self._max_model_len - len(prompt_ids)
        if room < 1:
            raise ValueError(f"a prompt of {len(prompt_ids)} tokens leaves no room in {self._max_model_len}")
        params = self._params(sampling_params, prompt_ids, room)
        self._live.add(request_id)
        try:
            output = await self._policy.generate(prompt_ids, params, session=request_id)
        finally:
            self._policy.release(request_id)
            self._live.discard(request_id)
        return self._output(output.token_ids, output.logprobs, output.finish)

    def _params(self, given: dict[str, Any], prompt_ids: list[int], room: int) -> SamplingParams:
        config = self._config
        if "max_tokens" not in given:
            left = config.prompt_length + config.response_length - len(prompt_ids)
            given = {**given, "max_tokens": min(config.response_length, left)}
        return sampling_params(given, limit=room, eos=self._eos, seed=self._seeds.getrandbits(63))

    def _output(self, tokens: list[int], logprobs: list[float], finish: Finish) -> TokenOutput:
        return TokenOutput(
            token_ids=tokens,
            log_probs=logprobs,
            stop_reason="aborted" if finish is Finish.ABORT else "completed",
            extra_fields={"global_steps": self._global_steps},
        )

    async def load_weights(self, weights: dict[str, np.ndarray], global_steps: int | None) -> None:
        """Put the trainer's weights into the model, in place.

        Raises:
            RuntimeError: a weight is missing, or the model has none of that name.
            InvariantError: a request is being sampled.
        """
        # A copy each: Ray's arrays are views of its store, which nobody may write to.
        state = {name: torch.tensor(array) for name, array in weights.items()}
        result = self._model.load_state_dict(state, strict=False)
        tied = set(self._model._tied_weights_keys or ()) if self._model.config.tie_word_embeddings else set()
        missing = set(result.missing_keys) - tied
        if missing or result.unexpected_keys:
            raise RuntimeError(f"weight sync: missing {sorted(missing)}, unknown {sorted(result.unexpected_keys)}")
        self._policy.weights_updated()
        self._global_steps = global_steps

    async def sleep(self) -> None:
        """vLLM gives its memory back here, after the last request; there is nothing to give back."""
        while self._live:
            await asyncio.sleep(0.01)

    async def abort_all_requests(self, reject_request: bool = False) -> dict[str, Any]:
        """End what is being sampled, with the tokens so far. New requests wait for ``resume_generation``, or are
        answered ``aborted`` at once."""
        aborted = sorted(self._live)
        self._open.clear()
        self._rejecting = reject_request
        self._policy.interrupt()
        return {"aborted_count": len(aborted), "request_ids": aborted}

    async def resume_generation(self) -> None:
        self._rejecting = False
        self._open.set()

    async def _nothing(self, *args: Any, **kwargs: Any) -> None: ...

    wake_up = clear_kv_cache = release_kv_cache = resume_kv_cache = start_profile = stop_profile = _nothing

    async def stats(self) -> dict[str, Any]:
        """The policy's counters, for tests."""
        return dict(vars(self._policy.stats))


def server_name(replica_rank: int) -> str:
    """The actor's name in Ray, which is vLLM's in verl."""
    return f"{NAME}_server_{replica_rank}_0"


class CPUReplica(RolloutReplica):
    """One server for each ``rollout_world_size`` trainer ranks. Tensor parallelism is only pretended: the server
    is one process."""

    async def launch_servers(self) -> None:
        path = self.model_config.get("local_path") or self.model_config.path
        server = (
            ray.remote(CPUServer)
            .options(name=server_name(self.replica_rank) + self.name_suffix, max_concurrency=self.max_concurrency)
            .remote(path, self.config, self.replica_rank)
        )
        await server.launch.remote()
        self.servers = [server]
        self._server_handle = server
        # The load balancer's key: two replicas with one address would silently become one.
        self._server_address = f"127.0.0.1:{self.replica_rank}"


class ServerAdapter(BaseRollout):
    """The trainer rank's side: takes its weights to the server of its replica."""

    def __init__(self, config: Any, model_config: Any, device_mesh: Any, replica_rank: int = -1):
        super().__init__(config, model_config, device_mesh)
        ranks = config.tensor_model_parallel_size * config.data_parallel_size * config.pipeline_model_parallel_size
        rank = int(os.environ["RANK"])
        self._replica_rank = rank // ranks if replica_rank == -1 else replica_rank
        self._leads = rank % ranks == 0
        self._server: Any = None

    async def resume(self, tags: list[str]) -> None: ...

    async def release(self) -> None: ...

    async def update_weights(
        self,
        weights: Iterator[tuple[str, torch.Tensor]] | AsyncIterator[tuple[str, torch.Tensor]],
        global_steps: int | None = None,
        wire_format: str = "named_tensors",
        peft_config: dict[str, Any] | None = None,
        base_sync_done: bool = False,
        **unused: Any,
    ) -> None:
        """Every rank has to read all of ``weights``: making a sharded parameter whole is a collective.

        Raises:
            NotImplementedError: a LoRA adapter by itself.
        """
        if wire_format != "named_tensors" or (peft_config and base_sync_done):
            raise NotImplementedError(
                "the CPU rollout takes whole weights: set actor_rollout_ref.model.lora.merge=True"
            )
        arrays: dict[str, np.ndarray] = {}
        async for name, weight in _each(weights):
            whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
            if self._leads:
                arrays[name] = whole.detach().float().cpu().numpy()
        if self._leads:
            if self._server is None:  # the server is launched after this adapter
                self._server = ray.get_actor(server_name(self._replica_rank))
            await self._server.load_weights.remote(arrays, global_steps)


async def _each(weights: Any) -> AsyncIterator[tuple[str, torch.Tensor]]:
    if hasattr(weights, "__aiter__"):
        async for pair in weights:
            yield pair
    else:
        for pair in weights:
            yield pair


RolloutReplicaRegistry.register(NAME, lambda: CPUReplica)
_ROLLOUT_REGISTRY[(NAME, "async")] = f"{__name__}.ServerAdapter"
