"""Where the vision tower starts: the first two layers look at neighbouring patches, as a convolution would.

The first CODE dimensions of a patch embedding hold its position alone: sine and cosine of four
frequencies of column and of row. A head whose query turns that code by an offset attends to the
patch at that offset (after d'Ascoli et al., "ConViT", 2021). Training moves everything from there;
a tower started at random had learned next to no digits after 20,000 images.
"""

import torch
from torch import Tensor
from transformers import CLIPVisionModel

RATES = torch.pi / 2 * torch.tensor([1.0, 0.6, 0.35, 0.15])
CODE = 4 * len(RATES)
HEIGHT, SHARPNESS = 2.0, 1.0
OFFSETS = ((-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (1, 1), (-1, 1), (1, -1))
BLOCKS = 4  # a patch's ink is first seen as BLOCKS x BLOCKS averages


def position_code(x: Tensor, y: Tensor) -> Tensor:
    """[..., CODE] from columns and rows of equal shape."""
    angles = torch.stack((x, y), dim=-1)[..., None] * RATES
    return torch.cat((angles.sin(), angles.cos()), dim=-1).flatten(-2)


def turn(dx: int, dy: int) -> Tensor:
    """[CODE,CODE], the map from the code of (x, y) to the code of (x + dx, y + dy)."""
    blocks = []
    for d in (dx, dy):
        cos, sin = torch.diag(torch.cos(d * RATES)), torch.diag(torch.sin(d * RATES))
        blocks.append(torch.cat((torch.cat((cos, sin), dim=1), torch.cat((-sin, cos), dim=1))))
    return torch.block_diag(*blocks)


def smooth_filters(like: Tensor) -> Tensor:
    """[W,3,P,P], constant in each block: zero for the position's dimensions, the ink of each block, then random."""
    width, channels, patch, _ = like.shape
    blocks = torch.randn(width, channels, BLOCKS, BLOCKS)
    blocks[:CODE] = 0
    blocks[CODE : CODE + BLOCKS**2] = 4 * torch.eye(BLOCKS**2).view(BLOCKS**2, 1, BLOCKS, BLOCKS)
    return 0.02 * blocks.repeat_interleave(patch // BLOCKS, dim=2).repeat_interleave(patch // BLOCKS, dim=3)


@torch.no_grad()
def start_local(tower: CLIPVisionModel) -> None:
    """Overwrites the tower's initial weights in place; the head dimension must be CODE."""
    embeddings = tower.embeddings
    side = tower.config.image_size // tower.config.patch_size
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    embeddings.position_embedding.weight.zero_()
    embeddings.position_embedding.weight[1:, :CODE] = HEIGHT * position_code(column, row).flatten(0, 1)
    embeddings.patch_embedding.weight.copy_(smooth_filters(embeddings.patch_embedding.weight))
    embeddings.class_embedding[:CODE] = 0
    for number, layer in enumerate(tower.encoder.layers[:2]):
        attention = layer.self_attn
        for h in range(tower.config.num_attention_heads):
            rows = slice(h * CODE, (h + 1) * CODE)
            attention.q_proj.weight[rows, :CODE] = SHARPNESS * turn(*OFFSETS[(h + 4 * number) % 8])
            attention.k_proj.weight[rows, :CODE] = SHARPNESS * torch.eye(CODE)
        torch.nn.init.orthogonal_(attention.v_proj.weight)
        attention.v_proj.weight[:, :CODE] = 0
        torch.nn.init.orthogonal_(attention.out_proj.weight, gain=0.7)
        attention.out_proj.weight[:CODE] = 0
