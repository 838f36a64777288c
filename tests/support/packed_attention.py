"""Attention over packed sequences in plain torch, where verl's sequence parallelism wants FlashAttention.

verl's packing, its Ulysses all-to-alls around the attention and its gathers behind the model stay what they are; only
the kernel inside is another.
"""

from torch.nn.functional import scaled_dot_product_attention

NAME = "packed_in_plain_torch"


def register():
    """Make `NAME` an attention implementation of transformers, and the kernel inside verl's Ulysses attention."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from verl.models.transformers import monkey_patch

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, lambda *arguments, **keywords: None)
    monkey_patch._flash_attention_forward = _kernel


def _attention(module, query, key, value, attention_mask, scaling, position_ids, **unused):
    from verl.models.transformers.monkey_patch import _ulysses_flash_attention_forward

    # [batch, heads, tokens, size] here, [batch, tokens, heads, size] there.
    states = (tensor.transpose(1, 2) for tensor in (query, key, value))
    output = _ulysses_flash_attention_forward(*states, None, query.shape[2], position_ids=position_ids, scale=scaling)
    return output, None


def _kernel(query, key, value, attention_mask, query_length, *, position_ids, scale):
    # A sequence begins wherever the position is 0.
    sequence = (position_ids == 0).cumsum(-1)
    visible = (sequence.unsqueeze(-1) == sequence.unsqueeze(-2)).tril().unsqueeze(1)
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    output = scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scale, enable_gqa=True)
    return output.transpose(1, 2)
