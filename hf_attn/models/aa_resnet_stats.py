"""Parameters and operations of an AA-ResNet, counted from its config. Needs no torch.

Two counts of operations. `gflops_paper` is the convention that reproduces the published figures (Bello et al., ICCV
2019): the batched products Q K^T and A V are left out; 10 operations a logit, 9 a pooled value, 7 an enlarged value, 1
a scaled query channel and 1 a residual addition are in. `gflops_all_products` is the honest one: two operations for every
multiply-add of convolutions, projections, classifier, relative logits and batched products, and nothing else.
The 10 a logit is fitted to the published table, not given by the paper.
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_attn.models.aa_resnet_config import AAResNetConfig

LOGIT, POOLED, ENLARGED = 10, 9, 7
"""Operations a value in the paper's convention."""


@dataclass
class _Tally:
    """Running counts: parameters, operations of products that both conventions count, and of one convention each."""

    parameters: int = 0
    products: int = 0
    batched: int = 0
    other: int = 0

    def convolve(self, in_channels: int, out_channels: int, kernel: int, size: int) -> None:
        """A convolution without bias; `size` is the side of its result."""
        weights = in_channels * out_channels * kernel**2
        self.parameters += weights
        self.products += 2 * weights * size**2

    def normalize(self, channels: int) -> None:
        self.parameters += 2 * channels

    def augment(
        self, config: AAResNetConfig, in_channels: int, channels: int, size: int, stride: int, pool: int
    ) -> None:
        """An augmented 3 x 3 convolution; `size` is the side of its input."""
        heads, result = config.num_attention_heads, -(-size // stride)
        key_dim, value_dim = (int(r * channels) // heads * heads for r in (config.kappa, config.upsilon))
        if not value_dim:
            self.convolve(in_channels, channels, 3, result)
            return
        key_dim = max(key_dim, config.min_head_key_dim * heads)
        for _ in range((stride * pool).bit_length() - 1):
            size = -(-size // 2)
        pixels = size**2
        if stride * pool > 1:  # the values of the last pooling only, as in the published figures' recipe
            self.other += POOLED * in_channels * pixels
        if value_dim < channels:
            self.convolve(in_channels, channels - value_dim, 3, result)
        self.convolve(in_channels, 2 * key_dim + value_dim, 1, size)
        self.convolve(value_dim, value_dim, 1, size)
        if config.relative:
            self.parameters += 2 * (2 * size - 1) * key_dim // heads
            self.products += 2 * 2 * pixels * (2 * size - 1) * key_dim
        self.batched += 2 * pixels**2 * (key_dim + value_dim)
        self.other += LOGIT * heads * pixels**2 + pixels * key_dim
        if size != result:
            self.other += ENLARGED * value_dim * result**2


def aa_resnet_stats(
    depth: int, kappa: float = 0.0, upsilon: float = 0.0, image_size: int = 224, num_labels: int = 1000
) -> dict[str, int | float]:
    """`config_stats` of AA-ResNet-34, 50, 101 or 152; upsilon=0 is the ResNet."""
    return config_stats(AAResNetConfig.of_depth(depth, kappa, upsilon, image_size=image_size, num_labels=num_labels))


def config_stats(config: AAResNetConfig) -> dict[str, int | float]:
    """Parameters and operations of AAResNetForImageClassification with this config, for one image.

    Returns:
        num_parameters, gflops_paper and gflops_all_products (10^9 operations, two for a multiply-add).
    """
    tally, wide = _Tally(), config.layer_type == "wide"
    size = config.image_size if wide else -(-config.image_size // 2)
    tally.convolve(config.num_channels, config.embedding_size, 3 if wide else 7, size)
    if not wide:
        tally.normalize(config.embedding_size)
        size = -(-size // 2)
        tally.other += POOLED * config.embedding_size * size**2
    in_channels = config.embedding_size
    for stage, (depth, channels) in enumerate(zip(config.depths, config.hidden_sizes, strict=True), start=1):
        for block in range(depth):
            stride = 2 if block == 0 and stage > 1 else 1
            _count_block(tally, config, stage, (in_channels, channels), size, stride, block == 0)
            in_channels, size = channels, -(-size // stride)
    if wide:
        tally.normalize(in_channels)
    labels = config.num_labels or 0
    if labels > 0:
        tally.parameters += (in_channels + 1) * labels
        tally.products += 2 * in_channels * labels
    return {
        "num_parameters": tally.parameters,
        "gflops_paper": (tally.products + tally.other) / 1e9,
        "gflops_all_products": (tally.products + tally.batched) / 1e9,
    }


def _count_block(
    tally: _Tally, config: AAResNetConfig, stage: int, channels: tuple[int, int], size: int, stride: int, first: bool
) -> None:
    in_channels, out_channels = channels
    result, bottleneck, wide = -(-size // stride), config.layer_type == "bottleneck", config.layer_type == "wide"
    inner, entering = (out_channels // 4, out_channels // 4) if bottleneck else (out_channels, in_channels)
    if bottleneck:
        tally.convolve(in_channels, inner, 1, size)
        tally.normalize(inner)
    if stage in config.attention_stages:
        tally.augment(config, entering, inner, size, stride, 2 if stage in config.pooled_stages else 1)
    else:
        tally.convolve(entering, inner, 3, result)
    tally.convolve(inner, out_channels, 1 if bottleneck else 3, result)
    # before each convolution in wide blocks, after it in the others
    for normed in (in_channels, out_channels) if wide else (inner, out_channels):
        tally.normalize(normed)
    if not wide and (in_channels != out_channels or stride != 1 or (first and config.first_shortcut)):
        tally.convolve(in_channels, out_channels, 1, result)
        tally.normalize(out_channels)
    if wide and stride == 2:
        tally.other += POOLED * in_channels * result**2
    tally.other += out_channels * result**2
