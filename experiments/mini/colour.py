"""Changes of an image's colours in training: light, contrast, saturation, channels, noise."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class ColourSettings:
    """Shares and strengths of the changes; `strength` 0 is none at all."""

    strength: float = 1.0
    brightness: float = 25.0
    contrast: float = 0.3  # largest logarithm
    saturation: float = 0.6
    channel: float = 0.08  # standard deviation of the logarithm of a channel's gain
    gray_share: float = 0.05
    permute_share: float = 0.1
    invert_share: float = 0.03
    noise_share: float = 0.4
    noise: float = 8.0


def change_colours(key: jax.Array, image: jax.Array, settings: ColourSettings, pad: jax.Array) -> jax.Array:
    """Changes an image (S, S, 3), 0..255; where it is NaN it becomes `pad`."""
    there = ~jnp.isnan(image)
    pixels = jnp.where(there, image, pad)
    if settings.strength:
        pixels = _change(key, pixels, settings)
    return jnp.where(there, jnp.clip(jnp.round(pixels), 0.0, 255.0), pad)


def _change(key: jax.Array, pixels: jax.Array, settings: ColourSettings) -> jax.Array:
    keys = jax.random.split(key, 10)

    def spread(i: int, shape: tuple[int, ...] = ()) -> jax.Array:
        return settings.strength * jax.random.uniform(keys[i], shape, minval=-1.0, maxval=1.0)

    def chance(i: int, share: float) -> jax.Array:
        return jax.random.uniform(keys[i]) < settings.strength * share

    gray = pixels.mean(-1, keepdims=True)
    saturation = jnp.where(chance(0, settings.gray_share), 0.0, 1 + settings.saturation * spread(1))
    pixels = gray + saturation * (pixels - gray)
    order = jnp.where(chance(2, settings.permute_share), jax.random.permutation(keys[3], 3), jnp.arange(3))
    pixels = pixels[..., order]
    pixels = pixels * jnp.exp(settings.channel * settings.strength * jax.random.normal(keys[4], (3,)))
    middle = pixels.mean()
    pixels = middle + (pixels - middle) * jnp.exp(settings.contrast * spread(5)) + settings.brightness * spread(6)
    pixels = jnp.where(chance(7, settings.invert_share), 255 - pixels, pixels)
    level = jnp.where(chance(8, settings.noise_share), settings.noise, 0.0)
    noise_key, level_key = jax.random.split(keys[9])
    return pixels + level * jax.random.uniform(level_key) * jax.random.normal(noise_key, pixels.shape)
