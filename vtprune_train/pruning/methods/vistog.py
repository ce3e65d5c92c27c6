"""VisToG (arXiv 2411.17773): learned tokens in the vision tower, to which patches are assigned.

No code is published. Shape suffixes: P tiles, N patches of a tile, G group tokens, S tokens of a tile in the tower, M
tower hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vtprune_train.core.flops import TowerGeometry
from vtprune_train.core.rounding import floor_of
from vtprune_train.pruning.base import PruningMethod
from vtprune_train.pruning.learned import Registers
from vtprune_train.pruning.methods.one_share import MergedInTower
from vtprune_train.pruning.needs import Needs
from vtprune_train.pruning.setting_types import Share
from vtprune_train.pruning.tower import Merged, TowerChange


class VisToG(MergedInTower):
    """``floor(keep * n)`` learned group tokens join a tile's n patches in the vision tower. They attend to the patches
    and to each other, but patches do not attend to them. After the tower, each patch is assigned to the most similar
    group token, and the group tokens, with the mean of their patches added, replace the patches.

    Args:
        keep: number of group tokens as a share of a tile's patches, in (0, 1].
        positions: ``renumber`` numbers the kept tokens 0, 1, ...; ``keep`` gives each group token the position of its
            first patch.
    """

    keep: Share = 0.25

    name = "vistog"
    paper = "Efficient Multi-modal Large Language Models via Visual Token Grouping (arXiv 2411.17773)"
    one_budget = True
    trains = "must be trained: it learns group tokens and their assignment"

    @property
    def needs(self) -> Needs:
        return Needs(positions=self.positions, tower=Grouping(self.name, self.keep))

    def tower_module(self, tower: TowerGeometry) -> nn.Module:
        return Groups(Grouping(self.name, self.keep).merged(tower), tower.hidden)

    @property
    def ratios(self) -> tuple[float, ...]:
        """None: the number of learned tokens is fixed."""
        return ()

    def for_budget(self, share: float, num_layers: int) -> PruningMethod:
        if not 0 < share <= 1:
            raise ValueError(f"budget={share:g} cannot be reached by vistog; use a share in (0, 1]")
        return replace(self, keep=share)


@dataclass(frozen=True)
class Grouping(TowerChange):
    """The change of the tower's tokens by :class:`VisToG`."""

    learns = True

    name: str
    keep: float

    def merged(self, tower: TowerGeometry) -> int:
        return max(1, floor_of(self.keep, tower.patches))

    def remaining(self, tower: TowerGeometry) -> tuple[int, ...]:
        return (tower.patches + self.merged(tower),) * tower.depth

    def lengths(self, tower: TowerGeometry) -> tuple[tuple[int, int], ...]:
        return tuple((count, count) for count in self.remaining(tower))

    def flops(self, tower: TowerGeometry) -> float:
        """Projections of groups and patches, similarities, and means."""
        groups, width = self.merged(tower), tower.hidden
        return 4.0 * (groups + tower.patches) * width**2 + 4.0 * groups * tower.patches * width

    def start(self, hidden: Tensor, tower: TowerGeometry, module: nn.Module | None) -> Merged:
        tokens = super().start(hidden, tower, module)
        assert isinstance(module, Groups), "the method's module is missing"
        if module.number != self.merged(tower):
            raise ValueError(
                f"vistog: keep={self.keep:g} needs {self.merged(tower)} group tokens, but the model was trained with "
                f"{module.number}; use the same keep ratio"
            )
        groups = module.tokens(hidden[:, 0]).unflatten(0, (len(hidden), -1)).to(hidden.dtype)
        sizes = torch.cat([tokens.sizes, tokens.sizes.new_ones(groups.shape[:2])], dim=1)
        return tokens._replace(hidden=torch.cat([hidden, groups], dim=1), sizes=sizes)

    def bias(self, tokens: Merged, tower: TowerGeometry) -> Tensor | None:
        """Isolated attention: class tokens and patches do not see group tokens."""
        first_group, length = tower.class_tokens + tower.patches, tokens.hidden.shape[1]
        if length < first_group:
            return None  # after the groups have replaced the patches
        index = torch.arange(length, device=tokens.hidden.device)
        hidden = (index[:, None] < first_group) & (index >= first_group)
        return torch.zeros(length, length, device=index.device, dtype=tokens.hidden.dtype).masked_fill(
            hidden, -torch.inf
        )[None, None]

    def finish(self, tokens: Merged, tower: TowerGeometry, module: nn.Module | None) -> Merged:
        first, first_group = tower.class_tokens, tower.class_tokens + tower.patches
        assert isinstance(module, Groups), "the method's module is missing"
        groups, assigned = module.assign(tokens.hidden[:, first_group:], tokens.hidden[:, first:first_group])
        sizes = tokens.sizes[:, : first + groups.shape[1]]
        return Merged(torch.cat([tokens.hidden[:, :first], groups], dim=1), sizes, assigned + first)


class Groups(nn.Module):
    """The learned part of :class:`VisToG`: ``number`` group tokens of the tower's ``width``, and their assignment."""

    def __init__(self, number: int, width: int):
        super().__init__()
        self.number, self.width = number, width
        self.tokens = Registers(number, width)
        self.assign = Assignment(width)

    def forward(self, rows: Tensor) -> Tensor:
        """[0, any] -> [0, number * width], connected to all parameters."""
        groups = self.tokens(rows).view(len(rows), self.number, self.width)
        return self.assign(groups, groups)[0].flatten(1)  # type: ignore[no-any-return]


class Assignment(nn.Module):
    """Assigns each patch to one group token: the hard choice in the forward pass, with the gradient of the softmax over
    groups (straight-through)."""

    def __init__(self, width: int):
        super().__init__()
        self.group_norm, self.patch_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.value, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, groups_PGM: Tensor, patches_PNM: Tensor) -> tuple[Tensor, Tensor]:
        """Returns [P, G, M], each group token with the mean of its patches added, and [P, N] int64, the group of each
        patch; ties go to the first group."""
        patches = self.patch_norm(patches_PNM)
        logits = (
            self.query(self.group_norm(groups_PGM)) @ self.key(patches).transpose(1, 2) * groups_PGM.shape[2] ** -0.5
        )
        soft = logits.float().softmax(dim=1)  # [P, G, N]
        chosen = logits.argmax(dim=1)  # [P, N]
        number = torch.arange(groups_PGM.shape[1], device=chosen.device)
        shares = (chosen[:, None] == number[:, None]).to(soft.dtype) - soft.detach() + soft
        means = shares / shares.sum(dim=2, keepdim=True).clamp(min=1.0)
        return groups_PGM + self.out(means.to(patches.dtype) @ self.value(patches)), chosen
