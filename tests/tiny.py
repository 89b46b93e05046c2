"""The smallest TinyFlux that has every part."""

from musubi_tuner.models.tinyflux.geometry import TinyFluxConfig

TINY = TinyFluxConfig(
    hidden_size=32,
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    joint_attention_dim=24,
    pooled_projection_dim=20,
    num_double_layers=1,
    num_single_layers=1,
    axes_dims_rope=(4, 6, 6),
    lune_expert_dim=40,
    lune_hidden_dim=16,
    sol_spatial_size=4,
    sol_hidden_dim=12,
)
