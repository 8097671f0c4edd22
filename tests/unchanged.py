# SPDX-License-Identifier: Apache-2.0
"""Small models, and the proof that what was done with one left no trace on it or on the process."""

from __future__ import annotations

import copy
import os
import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch._dynamo  # writes its cache folder into the environment when it is first imported, as a capture does
import transformers as hf
from torch import Tensor, nn
from torch.utils import _pytree as pytree

X = torch.linspace(-1, 1, 2 * 64).reshape(2, 64)


def mlp() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 64), nn.Dropout(), nn.Linear(64, 64)).eval()


def language_model() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=512, num_key_value_heads=2, **sizes)).eval()


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything a caller could see of a model and of the process's random numbers."""
    config = getattr(model, "config", None)
    return {
        "values": {k: v.clone() for k, v in model.state_dict().items() if not v.is_meta},
        "identities": {k: id(v) for k, v in [*model.named_parameters(), *model.named_buffers()]},
        "frozen": {k: v.requires_grad for k, v in model.named_parameters()},
        "training": {k: m.training for k, m in model.named_modules()},
        "classes": {k: type(m) for k, m in model.named_modules()},
        "hooks": {k: (len(m._forward_hooks), len(m._forward_pre_hooks)) for k, m in model.named_modules()},
        "config": None if config is None else copy.deepcopy(config.to_dict()),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "random": (torch.random.get_rng_state(), random.getstate(), pickle.dumps(np.random.get_state())),
        "threads": torch.get_num_threads(),
        "environment": dict(os.environ),
    }


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """What happens inside leaves the model and the process as they were."""
    before = state_of(model)
    yield
    after = state_of(model)
    for what in before:
        left, right = pytree.tree_leaves(before[what]), pytree.tree_leaves(after[what])
        assert len(left) == len(right), what
        for one, other in zip(left, right, strict=True):
            same = torch.equal(one.nan_to_num(7), other.nan_to_num(7)) if isinstance(one, Tensor) else one == other
            assert same, f"{what} changed"
