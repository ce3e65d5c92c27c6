"""Steps in time of a video's visual tokens, and drop points that count tokens per step.

A video whose steps are unknown is treated like an image: its grids are missing or of different sizes, or an earlier
method has already dropped tokens of it.

Shape suffixes: V candidates, F steps in time, N tokens of a step, C hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vtprune_train.core.rounding import floor_of
from vtprune_train.core.stream import Boundary, Drop, ImageSpan, SpanLayout


@dataclass(frozen=True)
class Steps:
    """``count`` steps in time of ``size`` tokens each, followed by ``rest`` tokens of no step (newlines)."""

    count: int
    size: int
    rest: int

    @property
    def tokens(self) -> int:
        """Number of tokens of all steps."""
        return self.count * self.size

    def of(self, hidden: Tensor) -> Tensor:
        """[F, N, C] tokens of each step, of a video's tokens [n, C], possibly followed by others."""
        return hidden[: self.tokens].unflatten(0, (self.count, self.size))


def steps_of(span: ImageSpan | SpanLayout, tokens: int) -> Steps | None:
    """The steps of a video that has ``tokens`` tokens; ``None`` for an image and if the steps are unknown."""
    sizes = [rows * columns for rows, columns in span.grids]
    of_steps = set(sizes[: span.frames])
    if len(sizes) < span.frames or len(of_steps) != 1 or sum(sizes) != tokens or 0 in of_steps:
        return None
    return Steps(span.frames, sizes[0], sum(sizes[span.frames :]))


def with_steps(spans: Sequence[SpanLayout]) -> Iterator[tuple[SpanLayout, int, Steps | None]]:
    """Each image and video of a drop point, the index of its first candidate, and its steps (see :func:`steps_of`)."""
    first = 0
    for span in spans:
        yield span, first, steps_of(span, span.before)
        first += span.before


def check_per_video(name: str, per: str) -> None:
    """Reject ``per: frame`` for a method that compares frames: a single frame would keep all of its tokens.

    Raises:
        ValueError: ``per`` is not ``video``.
    """
    if per != "video":
        raise ValueError(
            f"per={per!r} has no meaning for {name}, which compares the frames of a video; use per='video'"
        )


class VideoDrop(Drop):
    """A drop that reduces videos only: images and videos whose steps are unknown are kept whole, and so are tokens of
    no step. Subclasses override :meth:`of_steps` to count differently.

    :meth:`kept` is only called where lengths alone are known (budgets): every span then counts as a long video, of
    which the share ``keep`` is kept.
    """

    compares_frames = True

    def of_steps(self, steps: Steps) -> int:
        """Number of tokens kept from the steps of a video, at least one."""
        return max(1, floor_of(self.keep, steps.tokens))

    def kept_of(self, span: ImageSpan, length: int, before: int) -> int:
        steps = steps_of(span, before)
        return before if steps is None else self.of_steps(steps) + steps.rest


def picked_per_video(hidden_VC: Tensor, boundary: Boundary, pick: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Select candidates of each video; all other candidates are kept.

    Args:
        hidden_VC: candidates.
        boundary: a drop point with a :class:`VideoDrop`.
        pick: function of a video's tokens [F, N, C] and the number of them to keep, returning their int64 indices in
            F * N, in any order.

    Returns:
        [K] int64, ascending.
    """
    chosen = [boundary.span_of_visual[:0]]
    for span, first, steps in with_steps(boundary.spans):
        of_steps = 0
        if steps is not None:
            of_steps = steps.tokens
            chosen.append(first + torch.sort(pick(steps.of(hidden_VC[first:]), span.after - steps.rest)).values)
        chosen.append(torch.arange(first + of_steps, first + span.before, device=hidden_VC.device))
    return torch.cat(chosen)


def video_tokens(spans: Sequence[SpanLayout]) -> int:
    """Number of candidates that belong to a step of a video."""
    return sum(steps.tokens for _, _, steps in with_steps(spans) if steps is not None)
