# SPDX-License-Identifier: Apache-2.0
"""Per-head calibration of a hybrid: feature map, its scale and its weight against the window, by line search.

    o(c) = (1 − g) o_window + g o_linear,    g = σ(log c + log D_linear − lse_window)
    o(c) = c · rms_norm(Σ φ_q·φ_k v)         for maps without a normaliser: c by least squares

For queries of whole calibration sequences the softmax over the window (o_window, lse_window), the softmax over all keys
(o) and the linear branch (o_linear, and its mass D_linear) are computed, and c is what minimises Σ ‖o(c) − o‖², with
c = 0, the window alone, among the candidates: on calibration data the hybrid is never worse than its window. The
search starts where the linear branch has the mass of the softmax beyond the window (a ratio of means). The map's own
scale (τ of landmarks, of hedgehog's W, the slope of a fixed decay) is the candidate with the least error.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rewriter.errors import PlanError
from rewriter.kernels.linear_attention.feature_maps import output_norm
from rewriter.passes.linear_attention import landmarks
from rewriter.passes.linear_attention.form import Form
from rewriter.passes.linear_attention.maps import MAPS, Tokens

QUERIES = 8192  # queries of one head that are looked at; half of them place landmarks, the others choose
_SOFTMAXES = dict.fromkeys(("hedgehog", "hedgehog_fla", "hedgehog_exp"), (0.125, 0.25, 0.5, 1.0))
SHARPNESS = {"landmark": (1.0, 2.0, 4.0, 8.0, 16.0)} | _SOFTMAXES  # of the queries; the keys' W starts at the identity
SLOPES = (0.0, 1 / 512, 1 / 256, 1 / 128, 1 / 64)
_LOG_SCALES = tuple(x / 8 for x in range(-24, 25))  # around the ratio of means
_NOTHING = -1e30  # a score that no softmax sees


@dataclass(frozen=True)
class Shape:
    """What of the options decides which keys stay softmax.

    Attributes:
        scale: of the scores.
        window, block, sinks: as the pass has them; ``window=0``: no softmax is left.
        causal: keys after the query are hidden.
        decays: the linear branch has a fixed decay per head.
        anchor: what the linear terms are measured against, as the operator has it.
        horizon: positions that positional maps tell apart.
    """

    scale: float
    window: int
    block: str = "sliding"
    sinks: int = 0
    causal: bool = True
    decays: bool = False
    anchor: str = "none"
    horizon: int = 0

    @property
    def reach(self) -> int:
        """Positions before which every query's keys all stay softmax."""
        return self.window * (2 if self.block == "terrace" else 1) + self.sinks

    def masks(self, at: Tensor, keys: int) -> tuple[Tensor, Tensor]:
        """(softmax, linear) for queries at positions ``at [n]``, both bool ``[n, keys]``."""
        i, j = at[:, None], torch.arange(keys, device=at.device)
        visible = (j <= i) if self.causal else torch.ones(len(at), keys, dtype=torch.bool, device=at.device)
        if not self.window:
            return torch.zeros_like(visible), visible
        near = j // self.window >= i // self.window - 1 if self.block == "terrace" else j > i - self.window
        near = near | (j < self.sinks)
        return visible & near, visible & ~near


@dataclass(frozen=True)
class Sequences:
    """Whole calibration sequences at one site: q ``[n, H, T, D]``, k ``[n, Hk, S, D]``, v ``[n, Hk, S, Dv]``, float32."""

    q: Tensor
    k: Tensor
    v: Tensor

    @property
    def groups(self) -> int:
        return self.q.shape[1] // self.k.shape[1]


@dataclass(frozen=True)
class Probe:
    """Queries of one head, and what softmax gives them: ``[n, queries, ...]``."""

    q: Tensor
    group: Tensor  # [n, heads, T, D]: all queries of all heads that share the key head
    own: int  # which of these heads
    at: Tensor  # [queries] positions
    k: Tensor
    v: Tensor
    distance: Tensor  # [queries, keys]
    linear: Tensor  # [queries, keys]: keys of the linear branch
    window: Tensor  # o_window
    window_mass: Tensor  # lse_window
    far_mass: Tensor  # log mass of the softmax beyond the window
    output: Tensor  # o

    @property
    def share(self) -> Tensor:
        """The softmax's share beyond the window."""
        return torch.sigmoid(self.far_mass - self.window_mass)

    @property
    def window_error(self) -> float:
        """Σ ‖o_window − o‖²; Σ ‖o‖² where there is no window."""
        return float((self.window - self.output).square().sum())


def probe(data: Sequences, head: int, shape: Shape, at: Tensor) -> Probe:
    """What softmax attention gives the queries at positions ``at`` of one head."""
    q, k, v = data.q[:, head, at], data.k[:, head // data.groups], data.v[:, head // data.groups]
    own = head % data.groups
    group = data.q[:, head - own : head - own + data.groups]
    scores = shape.scale * q @ k.mT
    near, far = shape.masks(at, k.shape[1])
    soft = scores.masked_fill(~near, _NOTHING)
    whole = scores.masked_fill(~(near | far), _NOTHING)
    window = (
        torch.softmax(soft, -1) @ v if shape.window else torch.zeros_like(q[..., :1]).expand(*q.shape[:2], v.shape[2])
    )
    distance = (at[:, None] - torch.arange(k.shape[1], device=at.device)).clamp_min(0)
    top = soft.amax(-1) if shape.anchor == "max" else torch.zeros_like(soft[..., 0])  # masses are e^top times these
    window_mass, far_mass = soft.logsumexp(-1) - top, scores.masked_fill(~far, _NOTHING).logsumexp(-1) - top
    return Probe(q, group, own, at, k, v, distance, far, window, window_mass, far_mass, torch.softmax(whole, -1) @ v)


def positions(shape: Shape, data: Sequences, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Positions whose queries place landmarks, and positions whose queries choose; both sorted.

    Raises:
        PlanError: no query of the sequences sees a key beyond its window.
    """
    length = data.q.shape[2]
    first = shape.reach if shape.causal else 0
    if length - first < 2:
        raise PlanError(
            f"linear_attention: calibration sequences of {length} tokens never reach beyond the window ({shape.reach} "
            "keys), so nothing can be said about what lies there: give longer ones, or a smaller window"
        )
    wanted = max(2, min(length - first, QUERIES // len(data.q)))
    drawn = first + torch.randperm(length - first, generator=generator)[:wanted]
    return drawn[::2].sort().values, drawn[1::2].sort().values


@dataclass(frozen=True)
class HeadFit:
    """What was chosen for one query head."""

    parameters: Mapping[str, Tensor]
    scale: float
    slope: float
    error: float
    window_error: float
    power: float  # Σ ‖o‖²
    share: float  # mean share of the softmax beyond the window


@dataclass(frozen=True)
class SiteFit:
    """New tensors of a site by role, stacked over heads, and how far its outputs are off on calibration data."""

    tensors: Mapping[str, Tensor]
    figures: Mapping[str, float]

    @property
    def error(self) -> float:
        return self.figures["output_error"]


def fit(data: Sequences, shape: Shape, feature_map: str, features: int, generator: torch.Generator) -> SiteFit:
    """Calibrate every head of a site.

    Args:
        data: its queries, keys and values.
        shape: which keys stay softmax.
        feature_map: a name of `maps.MAPS`.
        features: landmarks per key head.

    Raises:
        PlanError: the sequences are too short for the window.
    """
    placing, choosing = positions(shape, data, generator)
    keys: list[Mapping[str, Tensor]] = []
    heads: list[HeadFit] = []
    for key_head in range(data.k.shape[1]):
        group = range(key_head * data.groups, (key_head + 1) * data.groups)
        candidates, key_parameters = _candidates(
            data, key_head, group, shape, feature_map, features, placing, generator
        )
        for head in group:
            heads.append(_best(probe(data, head, shape, choosing), shape, feature_map, candidates, key_parameters))
        keys.append(key_parameters)
    tensors = {role: torch.stack([k[role] for k in keys]) for role in keys[0]}
    tensors |= {role: torch.stack([h.parameters[role] for h in heads]) for role in heads[0].parameters}
    if shape.window:
        tensors["map_scale"] = torch.tensor([h.scale for h in heads])
    if shape.decays:
        tensors["log_decay"] = torch.tensor([-h.slope for h in heads])
    return SiteFit(tensors, _figures(heads, shape))


def start(form: Form, key_heads: int, dim: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Where a site starts without calibration data: branches on a par, gains 1, β = ½, slopes 2^(−8h/H)."""
    heads, fmap = form.heads, MAPS[form.feature_map]
    tensors = {} if form.is_mixture else fmap.start(key_heads, dim, form.horizon, generator)
    for role in fmap.query_roles if tensors else ():
        tensors[role] = tensors[role].repeat_interleave(heads // key_heads, 0)
    return tensors | {
        "map_scale": torch.ones(heads),
        "output_gain": torch.ones(heads),
        "window_share": torch.full((heads,), 0.5),
        "beta": torch.zeros(key_heads),
        "log_decay": -(2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads)),
    }


def _figures(heads: list[HeadFit], shape: Shape) -> dict[str, float]:
    power = sum(h.power for h in heads)
    found = {
        "output_error": math.sqrt(sum(h.error for h in heads) / power),
        "remote_share": sum(h.share for h in heads) / len(heads),
        "live_heads": float(sum(h.scale > 0 for h in heads)),
    }
    if shape.window:
        found["window_error"] = math.sqrt(sum(h.window_error for h in heads) / power)
    return found


def _candidates(
    data: Sequences,
    key_head: int,
    group: range,
    shape: Shape,
    feature_map: str,
    features: int,
    placing: Tensor,
    generator: torch.Generator,
) -> tuple[list[Mapping[str, Tensor]], Mapping[str, Tensor]]:
    """Parameters on the query side to choose from, and those on the key side, of one key head."""
    dim = data.q.shape[3]
    if feature_map == "landmark":
        probes = [probe(data, head, shape, placing) for head in group]
        queries = torch.cat([p.q.reshape(-1, dim) for p in probes])
        weights = torch.cat([p.share.reshape(-1) for p in probes]).clamp_min(1e-6).square()
        placed = landmarks.place(
            queries, weights, data.k[:, key_head].reshape(-1, dim), features, shape.scale, generator
        )
        return [placed.query_parameters(t) for t in SHARPNESS["landmark"]], placed.key_parameters()
    fmap = MAPS[feature_map]
    made = {role: value[0] for role, value in fmap.start(1, dim, shape.horizon, generator).items()}
    of_query = {role: made[role] for role in fmap.query_roles}
    candidates: list[Mapping[str, Tensor]] = [
        of_query | {"query_map": t * made["query_map"]} for t in SHARPNESS.get(feature_map, ())
    ]
    return candidates or [of_query], {role: made[role] for role in fmap.key_roles}


def _best(
    seen: Probe,
    shape: Shape,
    feature_map: str,
    candidates: list[Mapping[str, Tensor]],
    key_parameters: Mapping[str, Tensor],
) -> HeadFit:
    """The candidate, slope and weight with the least error; weight 0 where nothing beats the window."""
    best: tuple[float, float, float, Mapping[str, Tensor]] | None = None
    slopes = SLOPES if shape.decays else (0.0,)
    for parameters, slope in itertools.product(candidates, slopes):
        weight = _weights(seen, shape, feature_map, {**parameters, **key_parameters}, slope)
        if not MAPS[feature_map].positive:
            gain, error = _gain(seen, weight)
            if best is None or error < best[0]:
                best = error, 1.0, slope, {**parameters, "output_gain": gain}
            continue
        for log_scale, error in _line(seen, *_average(seen, weight)):
            if best is None or error < best[0]:
                best = error, math.exp(log_scale), slope, parameters
    assert best is not None  # noqa: S101 - there is a candidate for every map
    error, scale, slope, parameters = best
    if shape.window and not error < seen.window_error:
        error, scale = seen.window_error, 0.0
    power, share = float(seen.output.square().sum()), float(seen.share.mean())
    return HeadFit(parameters, scale, slope, error, seen.window_error, power, share)


def _weights(seen: Probe, shape: Shape, feature_map: str, parameters: Mapping[str, Tensor], slope: float) -> Tensor:
    """e^(−slope · distance) φ_q(q)·φ_k(k) of one head beyond its window, ``[n, queries, keys]``."""
    fmap, given = MAPS[feature_map], {role: value.unsqueeze(0) for role, value in parameters.items()}
    key = seen.k.unsqueeze(1)
    if fmap.whole:  # of whole sequences: all queries first, then those that are looked at
        places = (torch.arange(seen.group.shape[2]), torch.arange(key.shape[2]))
        q, k = fmap.features(Tokens(seen.group, key, shape.scale, position=places, horizon=shape.horizon), given)
        q, k = q[:, seen.own, seen.at], k.squeeze(1)
    else:
        q, k = (x.squeeze(1) for x in fmap.features(Tokens(seen.q.unsqueeze(1), key, shape.scale), given))
    weight = (q @ k.mT) * seen.linear
    return weight * torch.exp(-slope * seen.distance) if slope else weight


def _gain(seen: Probe, weight: Tensor) -> tuple[Tensor, float]:
    """(g, Σ ‖g · rms_norm(Σ φ_q·φ_k v) − o‖²), g by least squares."""
    normed = output_norm(weight @ seen.v)
    gain = (normed * seen.output).sum() / normed.square().sum().clamp_min(torch.finfo(normed.dtype).tiny)
    return gain, float((gain * normed - seen.output).square().sum())


def _average(seen: Probe, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(o_linear ``[n, queries, Dv]``, log D_linear ``[n, queries]``) of one head."""
    mass = weight.sum(-1)
    output = weight @ seen.v / mass.clamp_min(torch.finfo(mass.dtype).tiny).unsqueeze(-1)
    return output, mass.clamp_min(torch.finfo(mass.dtype).tiny).log()


def _line(seen: Probe, output: Tensor, mass: Tensor) -> Iterator[tuple[float, float]]:
    """(log c, Σ ‖o(c) − o‖²) around the c at which the linear branch has the softmax's mass beyond the window."""
    gap, turn = seen.window - seen.output, output - seen.window  # o(c) − o = gap + g · turn
    constant, mixed, square = gap.square().sum(-1), (gap * turn).sum(-1), turn.square().sum(-1)
    share = seen.share
    centre = float((share * (seen.far_mass - mass)).sum() / share.sum().clamp_min(1e-30))
    for step in _LOG_SCALES:
        g = torch.sigmoid(centre + step + mass - seen.window_mass)
        yield centre + step, float((constant + 2 * g * mixed + g.square() * square).sum())
