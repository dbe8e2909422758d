"""The parts of convolutional image towers."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.errors import UserError


def check_images(images, size=None):
    """Raises a UserError unless images are floating [B, H, W, 3], of `size` (int or (height, width)) if given."""
    want = (size, size) if isinstance(size, int) else size
    asked = "[B, H, W, 3]" if want is None else f"[B, {want[0]}, {want[1]}, 3]"
    if images.ndim != 4 or images.shape[-1] != 3 or (want is not None and images.shape[1:3] != tuple(want)):
        raise UserError(f"images should be {asked}; got {list(images.shape)}")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(f"images should be floating and normalised; got {images.dtype}: add normalize to the data ops")


ROWS_AT_ONCE = 5  # of a depthwise kernel, on a CPU


class FrozenBatchNorm(nn.Module):
    """Batch normalisation (Ioffe and Szegedy 2015) by stored statistics: (x - mean) / sqrt(var + eps) * scale + bias.

    The statistics are parameters, so that a model is a function of its parameters alone. The statistics have no
    gradient and stay constant. Weight decay would change the statistics: exclude `.*/(mean|var)` in the parameter
    table, or freeze the tower.

    Attributes:
      dtype: output dtype; the arithmetic is at least fp32.
      eps: added to the variance.
    """

    dtype: str = "float32"
    eps: float = 1e-3

    @nn.compact
    def __call__(self, x):
        """Normalises channels: [..., C] -> [..., C]."""
        ones, zeros, shape = nn.initializers.ones, nn.initializers.zeros, x.shape[-1:]
        mean = jax.lax.stop_gradient(self.param("mean", zeros, shape))
        var = jax.lax.stop_gradient(self.param("var", ones, shape))
        factor = self.param("scale", ones, shape) * jax.lax.rsqrt(var + self.eps)
        x = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) - mean) * factor + self.param("bias", zeros, shape)
        return x.astype(self.dtype)


def depthwise(x, kernel, strides, padding, **options):
    """Depthwise `lax.conv_general_dilated`: each channel has its own kernel; without dilation.

    A CPU computes a sum of shifted images, because XLA takes 10 to 40 times as long for a grouped convolution there.

    Args:
      x: [B, H, W, C].
      kernel: [k, k, 1, C].
      strides: (stride of H, stride of W).
      padding: "SAME", "VALID", or ((before, after) of H, (before, after) of W).
      **options: for `lax.conv_general_dilated`.
    """

    def shifts(x, kernel):
        pads = padding
        if isinstance(padding, str):
            pads = jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
        dtype, sums = x.dtype, jnp.promote_types(x.dtype, jnp.float32)
        kernel, x = kernel.astype(sums), jnp.pad(x.astype(sums), ((0, 0), *pads, (0, 0)))
        rows, columns = ((n - k) // s * s + 1 for n, k, s in zip(x.shape[1:3], kernel.shape[:2], strides, strict=True))
        if kernel.shape[0] > ROWS_AT_ONCE:
            return _row_by_row(x, kernel, strides, rows, columns).astype(dtype)
        shifted = lambda i, j: x[:, i : i + rows : strides[0], j : j + columns : strides[1]]
        y = sum(shifted(i, j) * kernel[i, j, 0] for i in range(kernel.shape[0]) for j in range(kernel.shape[1]))
        return y.astype(dtype)

    grouped = lambda x, kernel: jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
    return jax.lax.platform_dependent(x, kernel, cpu=shifts, default=grouped)


def _row_by_row(x, kernel, strides, rows, columns):
    """The sum of shifted images, one row of the kernel at a time: 7 x 7 shifts at once take a minute to compile."""

    def row(y, inputs):
        i, weights = inputs
        window = jax.lax.dynamic_slice_in_dim(x, i, rows, axis=1)[:, :: strides[0]]
        return y + sum(window[:, :, j : j + columns : strides[1]] * weights[j] for j in range(len(weights))), None

    sides = ((rows - 1) // strides[0] + 1, (columns - 1) // strides[1] + 1)
    y = jnp.zeros((len(x), *sides, x.shape[-1]), x.dtype)
    return jax.lax.scan(row, y, (jnp.arange(len(kernel)), kernel[:, :, 0]))[0]


class ConvNorm(nn.Module):
    """A convolution without bias, and its norm: [B, H, W, C] -> [B, H / stride, W / stride, features].

    Attributes:
      features: output channels; None: a depthwise convolution with as many outputs as inputs.
      kernel: side of the kernel.
      stride: stride in both directions; odd sizes round up.
      dtype: dtype of the convolution.
      padding: pixels on each side; None for TensorFlow's "SAME".
      eps: of the norm.
    """

    features: int | None
    kernel: int
    stride: int
    dtype: str
    padding: int | None = None
    eps: float = 1e-3

    @nn.compact
    def __call__(self, x):
        alone = self.features is None
        x = nn.Conv(
            x.shape[-1] if alone else self.features,
            (self.kernel, self.kernel),
            self.stride,
            padding="SAME" if self.padding is None else ((self.padding, self.padding),) * 2,
            feature_group_count=x.shape[-1] if alone else 1,
            conv_general_dilated=depthwise if alone else None,
            use_bias=False,
            dtype=self.dtype,
            # Variance 2 / (kernel pixels * outputs of one group): He et al. 2015, equation 14.
            kernel_init=nn.initializers.variance_scaling(2.0, "fan_in" if alone else "fan_out", "normal"),
            name="conv",
        )(x)
        return FrozenBatchNorm(self.dtype, self.eps, name="norm")(x)
