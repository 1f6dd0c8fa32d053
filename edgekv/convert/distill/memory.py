"""How much of a batch fits on the device at once."""

from __future__ import annotations

import torch

from edgekv.convert.distill.loss import CHUNK_LOGITS
from edgekv.convert.heal_recipe import HealRecipe
from edgekv.spec import MLA, ModelSpec

HEADROOM = 0.85  # share of the free memory that is planned with; the rest is fragments and workspaces


def saved_bytes_per_token(spec: ModelSpec, attention: MLA, recipe: HealRecipe) -> int:
    """Bytes of activations that one token keeps for the backward pass, in 16 bits.

    A layer keeps four vectors of width D, q, k, v and the mix of each head, and gate and up of the
    feed-forward (their product too if its weights are trained); one more layer's worth is in flight.
    """
    heads = attention.n_heads * 2 * (attention.head_dim + attention.value_dim)
    ffn = spec.layers[0].ffn_dim * (3 if recipe.train == "all" else 2)
    return 2 * (4 * spec.dim + heads + ffn) * (spec.n_layers + 1)


def micro_sequences(
    spec: ModelSpec, attention: MLA, recipe: HealRecipe, trained: int, device: torch.device
) -> int:
    """Sequences in one forward and backward pass; a batch is split into such parts.

    Call it once weights, masters and gradients are on the device; the optimizer's two moments of the
    `trained` values are still to come.
    """
    if device.type != "cuda":
        return recipe.batch_sequences
    free, _ = torch.cuda.mem_get_info(device)
    logits = 3 * 2 * CHUNK_LOGITS  # student, teacher and one in the making
    per_sequence = saved_bytes_per_token(spec, attention, recipe) * recipe.seq_len
    fitting = int((HEADROOM * free - logits - 8 * trained) // per_sequence)
    parts = -(-recipe.batch_sequences // max(1, fitting))
    return -(-recipe.batch_sequences // parts)
