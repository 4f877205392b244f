"""TEC's two adapters: what its pre-training adds to a vision transformer, and parameter-efficient fine-tuning keeps.

Gao et al., Towards Sustainable Self-supervised Learning (TEC), section 2.2 and appendix A. A checkpoint of
`ssl-bench pretrain tec` holds them as extras, beside a backbone whose class token is already MLP(T):

    input = InputAdapter.from_state(checkpoint.require_extra("input_adapter"))
    encoder = EncoderAdapter.from_state(checkpoint.require_extra("encoder_adapter"))
    blocks = block_outputs(backbone, images, class_token=input())   # without class_token: the merged one, the same
    tokens = encoder(blocks)                                        # Z_e: (B, 1 + N, D), the class token first

The input adapter keeps the class token T from before the merger, so it can be trained further, and merged again.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from ssl_bench.evaluate.backbone import Backbone

_LayerNorm = functools.partial(nn.LayerNorm, eps=1e-6)


class InputAdapter(nn.Module):
    """The class token T and the MLP before it enters: T' = MLP(T), without a residual."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        nn.init.normal_(self.cls_token, std=0.02)
        self.mlp = Mlp(dim, hidden)

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> InputAdapter:
        """The adapter of these weights; they tell its shape."""
        hidden, dim = state["mlp.fc1.weight"].shape
        adapter = cls(dim, hidden)
        adapter.load_state_dict(state)
        return adapter

    def forward(self) -> Tensor:
        """T', the same for all images. (1, 1, D)"""
        enhanced: Tensor = self.mlp(self.cls_token)
        return enhanced

    @torch.no_grad()
    def merged_into(self, backbone: Backbone) -> Backbone:
        """A copy of the network with T' as its class token: the same outputs, and no adapter any more."""
        merged = copy.deepcopy(backbone)
        merged.vit.cls_token.copy_(self())
        return merged


class EncoderAdapter(nn.Module):
    """Features of all blocks, merged by groups of neighbors, adapted, and added up. (Eqs. 1 and 2)

    Z_n = FC(concat(X_i .. X_j)), Z_e = sum over groups of Z_n + MLP(Z_n). As in the official code and unlike the paper,
    the features of all blocks together pass a LayerNorm before, and the sum passes one after.
    """

    def __init__(self, dim: int, depth: int, *, blocks_per_group: int, hidden: int) -> None:
        super().__init__()
        assert depth % blocks_per_group == 0
        groups = depth // blocks_per_group
        self.norm_blocks = _LayerNorm(depth * dim)
        self.merge = nn.ModuleList(nn.Linear(blocks_per_group * dim, dim) for _ in range(groups))
        self.mlp = nn.ModuleList(Mlp(dim, hidden) for _ in range(groups))
        self.norm = _LayerNorm(dim)

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> EncoderAdapter:
        """The adapter of these weights; they tell its shape."""
        dim, merged = state["merge.0.weight"].shape
        adapter = cls(
            dim,
            len(state["norm_blocks.weight"]) // dim,
            blocks_per_group=merged // dim,
            hidden=len(state["mlp.0.fc1.weight"]),
        )
        adapter.load_state_dict(state)
        return adapter

    def parts(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """What each group contributes: Z'_n = Z_n + MLP(Z_n), from the first blocks to the last. (B, T, D) each

        `blocks` are the outputs of all blocks as `block_outputs` gives them.
        """
        everything = self.norm_blocks(torch.cat(list(blocks), dim=-1))  # (B, T, depth * D)
        grouped = everything.chunk(len(self.merge), dim=-1)
        merged = [merge(group) for merge, group in zip(self.merge, grouped, strict=True)]
        return [z + mlp(z) for mlp, z in zip(self.mlp, merged, strict=True)]

    def forward(self, blocks: Sequence[Tensor]) -> Tensor:
        """Z_e. (B, T, D)"""
        first, *others = self.parts(blocks)
        adapted: Tensor = self.norm(functools.reduce(torch.add, others, first))
        return adapted


def block_outputs(
    backbone: Backbone, images: Tensor, *, class_token: Tensor | None = None, keep: Tensor | None = None
) -> list[Tensor]:
    """All tokens after every block, (B, 1 + n, D) each: raw, but for the last block's, which pass the final norm.

    `class_token` (1, 1, D) takes the place of the network's own; `keep` (B, n) is as in `Backbone.forward`. For plain
    ViTs with a class token, such as TEC trains.
    """
    architecture = backbone.architecture
    assert architecture.cls
    assert not architecture.beit
    assert not architecture.pre_norm
    vit = backbone.vit
    x, _ = backbone.embed(images, keep)
    if class_token is not None:
        if architecture.position and architecture.position_of_prefix:
            class_token = class_token + vit.pos_embed[:, :1]
        x = torch.cat([class_token.expand(len(x), -1, -1), x[:, 1:]], dim=1)
    outputs = []
    for block in vit.blocks:
        x = block(x)
        outputs.append(x)
    outputs[-1] = vit.norm(x)
    return outputs
