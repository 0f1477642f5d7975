"""The training forward pass: one sequence per image, several questions in it.

Shapes: N images, V visual tokens, P prefix, T tail, S = P + T, D width. See `train_data` for the layout.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import LlavaForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from glyphs.train_data import IGNORE, NO_COLOUR, NO_DIGIT, Batch

NO_KEYWORD = -2  # equals no keyword, and not -1, which marks a row without one
LOOKING = (1, 3, 5)  # the layers, counted among those that take part, that `look_loss` teaches
ATTENTION = "glyphs_packed"


def packed_attention(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **_
) -> tuple[Tensor, None]:
    """No mask: every row sees every row (tower). With the tail's mask [N,1,T,S]: causal prefix, masked tail.

    float32 also under autocast: torch's bfloat16 backward is twice as slow on a CPU.
    """
    with torch.autocast("cpu", enabled=False):
        q, k, v = query.float(), key.float(), value.float()
        if k.shape[1] != q.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        if attention_mask is None:
            out = scaled_dot_product_attention(q, k, v, scale=scaling)
        else:
            p = q.shape[2] - attention_mask.shape[2]
            head = scaled_dot_product_attention(q[:, :, :p], k[:, :, :p], v[:, :, :p], is_causal=True, scale=scaling)
            tail = scaled_dot_product_attention(q[:, :, p:], k, v, attn_mask=attention_mask, scale=scaling)
            out = torch.cat((head, tail), dim=2)
    return out.transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, packed_attention)


class CellHead(nn.Linear):
    """What a patch shows, by one linear map of its projected visual token.

    Colour or none, whether a glyph's centre lies in it, and which digit. The digit is asked at the centre
    alone at first, since there the eight patches around show all of the glyph; then, with `spread`, wherever
    the glyph covers the patch.
    """

    spread = False

    def __init__(self, width: int):
        super().__init__(width, NO_DIGIT + NO_COLOUR + 3)

    def loss(self, visual_NVD: Tensor, batch: Batch) -> Tensor:
        digit, colour, centre = self(visual_NVD).float().flatten(0, 1).split((NO_DIGIT, NO_COLOUR + 1, 2), dim=1)
        labels = (torch.from_numpy(x).flatten() for x in (batch.cell_digit, batch.cell_colour, batch.cell_centre))
        which, tint, middle = labels
        sure = torch.where(middle == 1, which, IGNORE)
        loss = cross_entropy(digit, sure) + cross_entropy(colour, tint) + cross_entropy(centre, middle)
        if self.spread:
            loss = loss + cross_entropy(digit, torch.where(which == NO_DIGIT, IGNORE, which))
        return loss


def pixels_from_images(images) -> Tensor:
    """uint8 [N,H,W,3] to float32 [N,3,H,W], as the checkpoint's image processor gives it."""
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5


def visual_tokens(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """[N,V,D]"""
    return torch.stack(list(model.get_image_features(pixels).pooler_output))


def tail_mask(block_NT: Tensor, prefix: int) -> Tensor:
    """Additive [N,1,T,P+T]: a row sees the prefix and what came before it in its own block."""
    same = block_NT[:, :, None] == block_NT[:, None, :]
    seen = same & torch.ones_like(same[0]).tril()
    seen = torch.cat((seen.new_ones(*seen.shape[:2], prefix), seen), dim=2)
    return torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))[:, None]


def packed_hidden(
    model: LlavaForConditionalGeneration,
    visual_NVD: Tensor,
    prefix_ids: Tensor,
    batch: Batch,
    stride: int = 1,
    looks: list[Tensor] | None = None,
    shown_NK: Tensor | None = None,
) -> Tensor:
    """Final hidden states of the tail, [N,T,D], through every `stride`-th decoder layer.

    `shown_NK`: the visual tokens that are there at all, ascending; the others' positions stay empty.
    """
    language = model.model.language_model
    (n, v, d), p = visual_NVD.shape, len(prefix_ids)
    at = int((prefix_ids == model.config.image_token_id).nonzero()[0])
    cells_NK = torch.arange(v).expand(n, -1) if shown_NK is None else shown_NK
    words = language.embed_tokens(prefix_ids).expand(n, -1, -1)
    seen = visual_NVD.gather(1, cells_NK[..., None].expand(-1, -1, d))
    tail = language.embed_tokens(torch.from_numpy(batch.tail_ids))
    hidden = torch.cat((words[:, :at], seen, words[:, at + v :], tail), dim=1)
    line = torch.arange(p).expand(n, -1)
    offsets = torch.from_numpy(batch.tail_offsets) + p
    positions = torch.cat((line[:, :at], at + cells_NK, line[:, at + v :], offsets), dim=1)
    p -= v - cells_NK.shape[1]
    mask = tail_mask(torch.from_numpy(batch.tail_block), p)
    rotary = language.rotary_emb(hidden, position_ids=positions)
    for number, layer in enumerate(language.layers[::stride]):
        if looks is not None and number in LOOKING:
            looks.append(look_loss(layer, hidden, rotary, at, batch))
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, position_ids=positions, use_cache=False)
    return language.norm(hidden[:, p:])


def look_loss(layer: nn.Module, hidden_NSD: Tensor, rotary: tuple[Tensor, Tensor], at: int, batch: Batch) -> Tensor:
    """How little attention the right patches get: the ones with the digit that the keyword names.

    -log of their share among all patches, over the rows from the keyword on.
    """
    attention, v = layer.self_attn, batch.cell_digit.shape[1]
    keyword = torch.from_numpy(batch.tail_keyword)
    digit = torch.from_numpy(batch.cell_digit)
    target = keyword[:, :, None] == digit.where(digit != NO_DIGIT, NO_KEYWORD)[:, None]
    normed = layer.input_layernorm(hidden_NSD)
    split = lambda x: x.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)  # noqa: E731
    query, key = split(attention.q_proj(normed)), split(attention.k_proj(normed))
    query, key = apply_rotary_pos_emb(query, key, *rotary)
    query = query[:, :: attention.num_key_value_groups, -keyword.shape[1] :]
    scores = query @ key[:, :, at : at + v].transpose(2, 3) * attention.scaling
    mass = scores.float().log_softmax(-1).masked_fill(~target[:, None], -1e4).logsumexp(-1)
    return -mass.transpose(1, 2)[target.any(-1)].mean()


def answer_losses(model: LlavaForConditionalGeneration, hidden_NTD: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Mean cross entropy over the answers' tokens, end tokens included, and over the hints."""
    losses = []
    for labels in map(torch.from_numpy, (batch.tail_labels, batch.tail_hints)):
        used = labels != IGNORE
        losses.append(cross_entropy(model.lm_head(hidden_NTD[used]).float(), labels[used]))
    return losses[0], losses[1]


@torch.no_grad()
def exact_answers(model: LlavaForConditionalGeneration, hidden_NTD: Tensor, batch: Batch) -> list[bool]:
    """For each row of one block, whether greedy decoding would give the whole answer.

    That is so exactly when each label is the most likely token after the ones before it.
    """
    labels = torch.from_numpy(batch.tail_labels)
    right = (model.lm_head(hidden_NTD).argmax(-1) == labels) | (labels == IGNORE)
    return right.all(dim=1).tolist()
