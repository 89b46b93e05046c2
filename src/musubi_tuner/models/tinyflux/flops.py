"""Floating-point operations of TinyFlux, counted from its geometry. Torch-free.

One multiply-add counts as two operations. With D hidden size, I = heads x head width, M MLP width, N image tokens, L text
tokens and T = N + L, the matrix products of one sample are

    double block   modulation 2 x 2 D 6D, and per token 2 D 3I (qkv) + 2 I D (out) + 4 D M (MLP) over T tokens,
                   attention 4 T T I (T queries against T keys, logits and weighted sum)
    single block   modulation 2 D 3D, the same per-token products over T tokens, attention 4 T T I
    ends           2 C D N (image in), 2 J D L (text in), 2 D C N (out), and the small networks on the conditioning vector

Norms, activations and the rotary embedding are left out: they are linear in T without a matrix product. A training
step is three forward passes: the backward pass computes the gradient of the input and of the weight of every product.
Checkpointing adds a fourth for the blocks.
"""

from musubi_tuner.models.tinyflux.geometry import TinyFluxConfig


def block_flops(config: TinyFluxConfig, image_tokens: int, text_tokens: int) -> tuple[int, int]:
    """Forward operations of one double and one single block, one sample."""
    width, inner = config.hidden_size, config.num_attention_heads * config.attention_head_dim
    tokens = image_tokens + text_tokens
    per_token = 2 * width * 3 * inner + 2 * inner * width + 4 * width * config.mlp_hidden
    attention = 4 * tokens * tokens * inner
    return 2 * 2 * width * 6 * width + tokens * per_token + attention, (
        2 * width * 3 * width + tokens * per_token + attention
    )


def conditioning_flops(config: TinyFluxConfig) -> int:
    """Forward operations of everything that acts once per sample, not per token."""
    width, pooled = config.hidden_size, config.pooled_projection_dim
    products = 256 * width + width * width + pooled * width
    if config.use_t5_vec:
        products += config.joint_attention_dim * width + width * width
    if config.guidance_embeds:
        products += 256 * width + width * width
    if config.use_lune_expert:
        hidden, features = config.lune_hidden_dim, config.lune_expert_dim
        products += (width + pooled) * hidden + 2 * hidden * hidden + hidden * features + features * width
    if config.use_sol_prior:
        hidden = config.sol_hidden_dim
        for outputs in (3, config.sol_spatial_size**2):
            products += (width + pooled) * hidden + hidden * hidden + hidden * outputs
        products += 3 * (hidden // 2) + (hidden // 2) * config.num_attention_heads
    return 2 * products


def forward_flops(config: TinyFluxConfig, batch: int, height: int, width: int, text_tokens: int) -> int:
    """Forward operations of a batch; height and width in latent cells."""
    tokens = height * width
    double, single = block_flops(config, tokens, text_tokens)
    ends = 2 * config.hidden_size * (2 * config.in_channels * tokens + config.joint_attention_dim * text_tokens)
    per_sample = config.num_double_layers * double + config.num_single_layers * single
    return batch * (per_sample + ends + conditioning_flops(config))


def training_flops(
    config: TinyFluxConfig, batch: int, height: int, width: int, text_tokens: int, *, checkpointing: bool = False
) -> int:
    """Operations of forward and backward; ``checkpointing`` adds a second forward of the blocks."""
    total = 3 * forward_flops(config, batch, height, width, text_tokens)
    if checkpointing:
        double, single = block_flops(config, height * width, text_tokens)
        total += batch * (config.num_double_layers * double + config.num_single_layers * single)
    return total
