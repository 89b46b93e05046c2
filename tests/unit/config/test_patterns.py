"""Patterns match whole paths as documented, and settings of a layer are resolved in one order."""

import pytest

from musubi_tuner.config.patterns import LayerSettings, matches, matches_published, resolve
from musubi_tuner.errors import ConfigError


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("single_blocks.3.mlp.fc1", "single_blocks.3.mlp.fc1", True),
        ("single_blocks.3.mlp.fc1", "single_blocks.3.mlp.fc12", False),
        ("single_blocks.3.mlp.fc1", "single_blocks.3.mlpxfc1", False),
        ("single_blocks.*.mlp.*", "single_blocks.17.mlp.fc1", True),
        ("single_blocks.*.mlp.fc*", "single_blocks.17.mlp.fc1", True),
        ("*.mlp.*", "single_blocks.17.mlp.fc1", False),
        ("single_blocks.[20-24].*", "single_blocks.20.mlp.fc1", False),
        ("single_blocks.[20-24].**", "single_blocks.20.mlp.fc1", True),
        ("single_blocks.[20-24].**", "single_blocks.24.attn.qkv", True),
        ("single_blocks.[20-24].**", "single_blocks.25.attn.qkv", False),
        ("single_blocks.[20-24].**", "single_blocks.2.attn.qkv", False),
        ("single_blocks.[9-10].**", "single_blocks.10.attn.qkv", True),
        ("single_blocks.[1, 3].attn.qkv", "single_blocks.3.attn.qkv", True),
        ("single_blocks.[1,3].attn.qkv", "single_blocks.2.attn.qkv", False),
        ("single_blocks.[1,3].attn.qkv", "single_blocks.13.attn.qkv", False),
        ("single_blocks.[0,4-6].attn.qkv", "single_blocks.5.attn.qkv", True),
        ("single_blocks.[7].attn.qkv", "single_blocks.7.attn.qkv", True),
        ("double_blocks.*.attn.[img,txt]_qkv", "double_blocks.0.attn.txt_qkv", True),
        ("**", "single_blocks.0.mlp.fc1", True),
        ("**.qkv", "single_blocks.0.attn.qkv", True),
        ("**.qkv", "single_blocks.0.attn.img_qkv", False),
        ("single_blocks.**.qkv", "single_blocks.0.attn.qkv", True),
        ("single_blocks.0.**.attn.qkv", "single_blocks.0.attn.qkv", True),
        ("single_blocks.**", "single_blocksx.0.attn.qkv", False),
    ],
)
def test_matches(pattern: str, path: str, expected: bool) -> None:
    assert matches(pattern, path) is expected


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [("single_blocks.*.mlp.*", "single_blocks.3.mlp.fc1", True), ("*.mlp.*", "single_blocks.3.mlp.fc1", False),
     ("single_blocks.[20-24].attn.qkv", "single_blocks.24.attn.qkv", True),
     ("single_blocks.[1,3].attn.qkv", "single_blocks.3.attn.qkv", True),
     # As they acted there: a single number matched nothing, and two stars were one part of two characters or more.
     ("single_blocks.[1].attn.qkv", "single_blocks.1.attn.qkv", False),
     ("single_blocks.[1.attn.qkv", "single_blocks.1.attn.qkv", False),
     ("single_blocks.**", "single_blocks.12.attn.qkv", False), ("single_blocks.**.attn.qkv", "single_blocks.12.attn.qkv", True),
     ("single_blocks.**.attn.qkv", "single_blocks.1.attn.qkv", False)],
)  # fmt: skip
def test_patterns_of_published_files(pattern: str, path: str, expected: bool) -> None:
    assert matches_published(pattern, path) is expected


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("single_blocks..qkv", "has an empty part"),
        ("", "has an empty part"),
        ("single**.qkv", r"\*\* stands for whole parts"),
        ("single_blocks.[1.qkv", "a bracket is not closed"),
        ("single_blocks.1].qkv", "a bracket is not closed"),
        ("single_blocks.[[1]].qkv", "a bracket is not closed"),
        ("single_blocks.[].qkv", r"\[\] is not a list"),
        ("single_blocks.[1,].qkv", r"\[1,\] is not a list"),
        ("single_blocks.[a-b].qkv", r"\[a-b\] is not a list"),
        ("single_blocks.[5-2].qkv", "must be an ascending range"),
        ("single_blocks.[0-99999999999].qkv", "ascending range of at most 10000"),
    ],
)
def test_unreadable_pattern(pattern: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        matches(pattern, "single_blocks.1.qkv")


def test_later_targets_win_field_by_field() -> None:
    targets = [("a.*", {"rank": 8, "lr_scale": 2.0}), ("b.*", {"rank": 1}), ("a.[0-1]", {"rank": 4, "enabled": False})]
    assert resolve("a.1", LayerSettings(alpha=6.0), targets) == (
        LayerSettings(rank=4, alpha=6.0, lr_scale=2.0, enabled=False),
        False,
    )
    assert resolve("a.2", LayerSettings(), targets)[0] == LayerSettings(rank=8, lr_scale=2.0)
    assert resolve("c", LayerSettings(), targets) == (LayerSettings(), False)


def test_a_layer_is_asked_for_by_enabled_alone() -> None:
    assert resolve("a", LayerSettings(), [("a", {"rank": 4})])[1] is False
    assert resolve("a", LayerSettings(), [("a", {"enabled": True}), ("a", {"rank": 4})])[1] is True


def test_parallel_pairs_are_one_wider_pair() -> None:
    assert LayerSettings(rank=3, alpha=6.0, depth=2).folded == (6, 12.0)
    assert LayerSettings(rank=3, alpha=0.0, depth=2).folded == (6, 6.0)
