"""What `DecodeLoop` and `Engine` share: a model with its cache, its stop rule and what that brings about."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from lil_ops import policies
from lil_ops.actions import Action, Course, Rescue
from lil_ops.integrations.attach import attach
from lil_ops.integrations.transformers import NAME, LilCache, cache_argument
from lil_ops.policies import Policy
from lil_ops.sampling import check_sampling
from lil_ops.stopping import StopRule

if TYPE_CHECKING:
    from transformers.cache_utils import Cache
    from typing_extensions import Self

TokenIds = torch.Tensor | Sequence[torch.Tensor | Sequence[int]]


class ModelLoop:
    """A context manager, in which the model has attention "lil"; those of one model have to be nested. Arguments and
    errors as in `lil_ops.generate`; batch: rows of the cache; prompt_lens: as `LilCache.begin` takes them; sampling:
    options of `lil_ops.sampling.sample`.

    Attributes: ``cache`` the `LilCache`.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        policy: str | Policy,
        guardian: StopRule | None,
        action: Action | None,
        measure_loss: bool,
        batch: int,
        max_tokens: int,
        prompt_lens: list[int],
        sampling: dict,
        **cache_options,
    ):
        check_sampling(**sampling)
        if guardian is not None and not isinstance(guardian, StopRule):
            raise ValueError(f"guardian: expected a stop rule, such as Guardian(), or None, got {guardian!r}")
        if action is not None and guardian is None:
            raise ValueError("action: expected a stop rule beside it (guardian=...), got none")
        if action is not None and not isinstance(action, Action):
            raise ValueError(f"action: expected an Answer, a Rescue or None, got {action!r}")
        self._model, self._vocab_size, self._sampling = model, attach(model).vocab_size, sampling
        self._rule, self._action = guardian, action
        if answer := action.then if isinstance(action, Rescue) else action:
            answer.check(self._vocab_size)
        if guardian and guardian.needs_loss:
            cache_options = policies.with_loss(policy, cache_options)
        self.cache = LilCache(model, policy, batch=batch, max_tokens=max_tokens, **cache_options)
        self.cache.begin(prompt_lens)
        if isinstance(action, Rescue):
            action.check(self.cache.policy)
            self.cache.raised_budget = action.budget
        if measure_loss or (guardian and guardian.needs_loss):
            self.cache.watch_loss()
        self._cache_argument = cache_argument(model)
        self._attention_before: str | None = None

    def __enter__(self) -> Self:
        self._attention_before = self._model.config._attn_implementation
        self._model.set_attn_implementation(NAME)
        return self

    def __exit__(self, *exception) -> None:
        self._model.set_attn_implementation(self._attention_before)

    def _course(self) -> Course:
        """Of a new sequence."""
        return Course(self._action, self._rule.interval if self._rule else 0)

    def _forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """``[rows, tokens]`` each -> the last token's logits, ``[rows, vocab]``."""
        return self._logits(self._model, self.cache, input_ids, position_ids)

    def _logits(
        self, model: Callable, cache: Cache, input_ids: torch.Tensor, position_ids: torch.Tensor
    ) -> torch.Tensor:
        device = self._model.device
        where = {"input_ids": input_ids.to(device), "position_ids": position_ids.to(device)}
        return model(**where, **{self._cache_argument: cache}, use_cache=True, logits_to_keep=1).logits[:, -1]


def check_prompts(input_ids: TokenIds, vocab_size: int) -> list[torch.Tensor]:
    """The prompts as 1-D int64 tensors on the CPU."""
    if isinstance(input_ids, torch.Tensor) and input_ids.ndim != 2:
        raise ValueError(f"input_ids: expected [batch, tokens], got shape {list(input_ids.shape)}")
    if len(input_ids) == 0:
        raise ValueError("input_ids: expected at least one sequence, got an empty batch")
    prompts = []
    for row, sequence in enumerate(input_ids):
        ids = torch.as_tensor(sequence)
        if ids.ndim != 1:
            raise ValueError(
                f"input_ids: sequence {row}: expected a list of ids or a 1-D tensor, got {ids.ndim} dimensions"
            )
        if len(ids) == 0:
            raise ValueError(f"input_ids: sequence {row}: expected at least one token, got an empty prompt")
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ValueError(f"input_ids: sequence {row}: expected integers, got {ids.dtype}")
        ids = ids.to("cpu", torch.int64)
        outside = ids[(ids < 0) | (ids >= vocab_size)]
        if len(outside):
            raise ValueError(
                f"input_ids: sequence {row}: expected ids from 0 to {vocab_size - 1}, got {int(outside[0])}"
            )
        prompts.append(ids)
    return prompts


def uniforms(count: int, seed: int) -> torch.Tensor:
    """``[count]`` numbers for `sample`, from a generator of this seed: they depend on nothing else."""
    seed = operator.index(seed)
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: expected a whole number of 64 bits, got {seed}")
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


def whole_numbers(numbers: int | Iterable[int]) -> list[int]:
    """One, or several, as a list; also those of numpy and of tensors."""
    try:
        return [operator.index(numbers)]
    except TypeError:
        return [operator.index(number) for number in numbers]


def eos_ids(model: torch.nn.Module, eos_token_id: int | Iterable[int] | None) -> list[int]:
    """The ids as a list; None: the model's own."""
    if eos_token_id is None:
        eos_token_id = model.generation_config.eos_token_id
    if eos_token_id is None:
        return []
    return whole_numbers(eos_token_id)
