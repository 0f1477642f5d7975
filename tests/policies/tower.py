"""A CLIP tower and LLaVA's projector written plainly in float64 torch: whole maps, one image at a time.

Legend: T patches of an image, C tower width, H heads, D decoder width.
"""

from __future__ import annotations

import torch


class PlainTower:
    """The vision half of a transformers LLaVA in float64."""

    def __init__(self, model) -> None:
        self.tower = model.model.vision_tower.double()
        self.project = model.model.multi_modal_projector.double()
        self.layers = self.tower.encoder.layers
        self.used = model.config.vision_feature_layer % (len(self.layers) + 1)  # how many layers run

    @torch.no_grad()
    def run(self, pixels, merge=None):
        """Of one image [3,H,W]: hidden states behind each used layer, maps [H,1+T,1+T] and keys [H,1+T,d] of each.

        merge: called between attention and MLP of every layer, (layer, x [S,C], keys [H,S,d]) → x; and
        ``merge.size`` [S] weighs attention.
        """
        x = self.tower.pre_layrnorm(self.tower.embeddings(pixels[None].double()))[0]
        hidden, maps, keys = [x], [], []
        for i, layer in enumerate(self.layers[: self.used]):
            a, y = layer.self_attn, layer.layer_norm1(x)
            q, k, v = (p(y).view(len(y), a.num_heads, -1).transpose(0, 1) for p in (a.q_proj, a.k_proj, a.v_proj))
            logit = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
            if merge:
                logit = logit + merge.size.log()
            maps.append(logit.softmax(-1))
            keys.append(k)
            x = x + a.out_proj((maps[-1] @ v).transpose(0, 1).reshape(len(y), -1))
            if merge:
                x = merge(i, x, k)
            x = x + layer.mlp(layer.layer_norm2(x))
            hidden.append(x)
        return hidden, maps, keys

    @torch.no_grad()
    def embeds(self, pixels):
        """[T, D] of one image, nothing pruned."""
        return self.project(self.run(pixels)[0][-1][1:])


class Merging:
    """ToMe by its words: tokens are lists of original patches; a class token is patch −1 and never merged."""

    def __init__(self, tokens: int, left: list[int], classed: bool = True) -> None:
        self.first, self.left = int(classed), left
        self.holds, self.leader = [[i] for i in range(-self.first, tokens)], list(range(-self.first, tokens))

    @property
    def size(self):
        return torch.tensor([float(len(h)) for h in self.holds], dtype=torch.float64)

    def __call__(self, layer, x, keys):
        unit = keys.mean(0)
        unit = unit / unit.norm(dim=1, keepdim=True)
        evens, odds = list(range(0, len(x), 2)), list(range(1, len(x), 2))
        ties = []
        for i in evens:
            likeness = [float(unit[i] @ unit[j]) for j in odds]
            ties.append((max(likeness), i, odds[likeness.index(max(likeness))]))
        merged = sorted((t for t in ties if self.leader[t[1]] >= 0), reverse=True)[
            : len(x) - self.first - self.left[layer]
        ]
        groups = {j: [j] for j in odds}
        for _, i, j in merged:
            groups[j].append(i)
        gone = {i for _, i, _ in merged}
        rows = [[i] for i in evens if i not in gone] + [groups[j] for j in odds]
        size = self.size
        x = torch.stack([sum(size[i] * x[i] for i in row) / size[row].sum() for row in rows])
        self.leader = [self.leader[row[0]] for row in rows]
        self.holds = [[p for i in row for p in self.holds[i]] for row in rows]
        return x


def best(score, count):
    """Indices of the ``count`` highest, ascending; of equals the first."""
    order = sorted(range(len(score)), key=lambda i: (-float(score[i]), i))
    return sorted(order[:count])


def received(embeds_TD):
    """STAR stage 1: r_j = mean_i softmax(HHᵀ/√d)_ij. Equal rows, as newlines are, have one score to the last bit."""
    score_T = (embeds_TD @ embeds_TD.T / embeds_TD.shape[1] ** 0.5).softmax(1).mean(0)
    return score_T[(embeds_TD[:, None] == embeds_TD).all(-1).int().argmax(1)]


def contextual(features, keys, dominant, count):
    """VisionZip's merging: {place: feature} of the contextual tokens, one image."""
    rest = [t for t in range(len(features)) if t not in set(dominant)]
    targets = rest[:: len(rest) // count][:count]
    unit = keys / keys.norm(dim=1, keepdim=True).clamp(min=1e-12)
    joined = {t: [] for t in targets}
    for r in rest:
        if r not in joined:
            likeness = [float(unit[r] @ unit[t]) for t in targets]
            joined[targets[likeness.index(max(likeness))]].append(features[r])
    return {t: features[t] + (torch.stack(j).mean(0) if j else 0) for t, j in joined.items()}
