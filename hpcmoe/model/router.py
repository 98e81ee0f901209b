"""Which experts a token row goes to, and with what weight."""

from __future__ import annotations

import numpy as np

from hpcmoe.config import RouterConfig
from hpcmoe.device import xp_of


def softmax(x):
    """exp(x) / sum exp(x) over the last axis, safe for large values; -inf gives 0."""
    xp = xp_of(x)
    e = xp.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def top_k(score_te, k: int):
    """The k largest per row, best first, the lower index first among equals: int64 [t, k]."""
    xp = xp_of(score_te)
    score_te = score_te.copy()
    rows = xp.arange(len(score_te))
    chosen_tk = xp.empty((len(score_te), k), dtype=np.int64)
    for i in range(k):
        best_t = score_te.argmax(axis=1)
        chosen_tk[:, i] = best_t
        score_te[rows, best_t] = -np.inf
    return chosen_tk


def scores(logit_te, config: RouterConfig, bias_e=None):
    """(score_te, choice_te) of logits, fp32: what weights are made of, and what experts are chosen by, -inf where they cannot
    be. Not of SparseMixer."""
    xp = xp_of(logit_te)
    logit_te = logit_te.astype(np.float32, copy=False)
    if config.score == "sigmoid":
        score_te = 1.0 / (1.0 + xp.exp(-logit_te))
    else:
        score_te = softmax(logit_te) if config.over == "all" else logit_te
    choice_te = score_te if bias_e is None else score_te + bias_e
    return score_te, _best_groups(choice_te, config) if config.groups > 1 else choice_te


def weights_beside(score_te, expert_tk, config: RouterConfig):
    """What each expert would weigh beside the chosen ones, which keep their weights: fp32 [t, e]; of these, their weights."""
    xp = xp_of(score_te)
    chosen_tk = xp.take_along_axis(score_te, expert_tk, axis=1)
    if config.score == "softmax" and config.over == "selected":
        top_t = chosen_tk.max(axis=1, keepdims=True)
        score_te = xp.exp(score_te - top_t) / xp.exp(chosen_tk - top_t).sum(axis=1, keepdims=True)
    elif config.renormalise:
        score_te = score_te / chosen_tk.sum(axis=1, keepdims=True)
    return (score_te * np.float32(config.scale)).astype(np.float32)


def gate(logit_te, config: RouterConfig, bias_e=None):
    """expert_tk int64 and weight_tk fp32 of router logits [t, e].

    Softmax over all, top-k, renormalised: Mixtral (arXiv 2401.04088), Qwen3-MoE; not
    renormalised: OLMoE (arXiv 2409.02060); sigmoid, bias for the choice, groups, scale:
    DeepSeek-V3 (arXiv 2412.19437, section 2.1.2); softmax over the selected: GPT-OSS model card.
    """
    xp = xp_of(logit_te)
    if config.score == "sparsemixer":
        return _sparsemixer(logit_te.astype(np.float32), config)
    score_te, choice_te = scores(logit_te, config, bias_e)
    expert_tk = top_k(choice_te, config.top_k)
    weight_tk = xp.take_along_axis(score_te, expert_tk, axis=1)
    if config.score == "softmax" and config.over == "selected":
        weight_tk = softmax(weight_tk)
    elif config.renormalise:
        weight_tk = weight_tk / weight_tk.sum(axis=1, keepdims=True)
    return expert_tk, (weight_tk * np.float32(config.scale)).astype(np.float32)


def _best_groups(choice_te, config: RouterConfig):
    """Choices outside the best `top_groups` groups set to -inf; a group scores by its two best."""
    xp = xp_of(choice_te)
    t, e = choice_te.shape
    choice_tge = choice_te.reshape(t, config.groups, e // config.groups)
    two = min(2, choice_tge.shape[2])
    best = -xp.sort(-choice_tge, axis=2)[:, :, :two].sum(axis=2)
    keep = xp.zeros((t, config.groups), dtype=bool)
    keep[xp.arange(t)[:, None], top_k(best, config.top_groups)] = True
    return xp.where(keep[:, :, None], choice_tge, -np.inf).reshape(t, e)


def _sparsemixer(logit_te, config: RouterConfig):
    """Phi-3.5-MoE at inference (GRIN, arXiv 2409.12136).

    Each choice in turn: the best expert, weighted by a softmax over those within a relative
    distance of 2 x jitter of it; the chosen one is out of the next round.
    """
    xp = xp_of(logit_te)
    rows = xp.arange(len(logit_te))
    left_te = logit_te.copy()
    expert_tk = xp.empty((len(logit_te), config.top_k), dtype=np.int64)
    weight_tk = xp.empty((len(logit_te), config.top_k), dtype=np.float32)
    for k in range(config.top_k):
        best_t = left_te.argmax(axis=1)
        top = left_te[rows, best_t][:, None]
        size = xp.maximum(xp.maximum(xp.abs(logit_te), top), np.float32(1e-30))
        far_te = (top - logit_te) / size > 2 * config.jitter
        probability_te = softmax(xp.where(far_te, -np.inf, left_te))
        expert_tk[:, k] = best_t
        weight_tk[:, k] = probability_te[rows, best_t]
        left_te[rows, best_t] = -np.inf
    return expert_tk, weight_tk
