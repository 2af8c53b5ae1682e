"""The choice of widths for one model: calibrations at each width, their damages, the program, and rules."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from ahcptq_jax.architectures import architecture_of
from ahcptq_jax.calibration.cache import StatisticsCache
from ahcptq_jax.calibration.calibrate import calibrate
from ahcptq_jax.calibration.images import CalibrationImage
from ahcptq_jax.calibration.weights import quantize_weights
from ahcptq_jax.config import QuantConfig
from ahcptq_jax.mixed import sensitivity
from ahcptq_jax.mixed.budget import COSTS, WIDTHS, Budget, Option, Product, parse_budget, solve
from ahcptq_jax.quantizers import Quantizer
from ahcptq_jax.quantizers.weights import QuantizedWeight
from ahcptq_jax.recipe import recipe_of
from ahcptq_jax.rules import Rule
from sam_flax.sam import Params

# Damages are measured on so many of the calibration images.
IMAGES = 4
FLOAT_WIDTH = 32  # of an operand that stays in floating point, as its cost is counted


def choose_widths(
    sam: Any, params: Params, images: Sequence[CalibrationImage], config: QuantConfig, progress: bool = False
) -> tuple[Rule, ...]:
    """Rules that give every layer, and where the budget counts them every site, its width.

    Weights alone are chosen where the budget counts nothing else; activations then keep their widths. Widths that the
    configuration's own rules give are kept. So is that of every attention map, whose slopes are never held whole.

    Args:
        sam: the module.
        params: its floating-point parameters.
        images: the calibration images.
        config: its `budget` is met; its widths are those of what is not chosen.
        progress: shows bars on stderr.

    Raises:
        InputError: if the budget cannot be read, or the smallest widths exceed it.
    """
    budget = parse_budget(config.budget)
    architecture = architecture_of(sam)
    some = list(images[:IMAGES])
    plain = dataclasses.replace(config, budget="")
    cache = StatisticsCache()
    calibrated = calibrate(sam, params, some, plain, progress=progress, cache=cache)
    transformed = calibrated.params
    sites = sorted(calibrated.quantized.activations)
    boxes = len(some[0].boxes)
    all_products = sensitivity.products(architecture, sam, transformed, boxes, sites)
    wanted = {site for product in all_products for site in (product.left, product.right) if site in set(sites)}
    chosen_sites = _free_sites(config, architecture, wanted) if _counts_activations(budget, all_products) else ()
    weights: dict[int, dict[str, QuantizedWeight]] = {}
    activations: dict[int, dict[str, Quantizer]] = {}
    for bits in tqdm(WIDTHS, desc="widths", disable=not progress):
        grid_bits = max(bits, plain.grid_bits) if plain.grid_bits else 0
        at = dataclasses.replace(plain, w_bits=bits, a_bits=bits, grid_bits=grid_bits)
        weights[bits] = quantize_weights(transformed, sites, recipe_of(architecture, at), cache)[1]
        if chosen_sites:
            activations[bits] = dict(calibrate(sam, params, some, at, cache=cache).quantized.activations)
    layers = tuple(sorted(p.left.removesuffix("/input") for p in all_products if p.weights))
    damages: dict[str, dict[int, float]] = {}
    for index, image in enumerate(tqdm(some, desc="sensitivities", disable=not progress)):
        key = jax.random.fold_in(jax.random.key(config.seed), index)
        prompts, canvas = jnp.asarray(image.boxes), jnp.asarray(image.canvas)
        found = sensitivity.slopes(architecture, sam, transformed, canvas, prompts, key, layers, chosen_sites)
        damages = sensitivity.measured(damages, found, weights, activations, transformed)
    return _rules(config, architecture, budget, all_products, damages)


def _counts_activations(budget: Budget, products: Sequence[Product]) -> bool:
    cost = COSTS[budget.name]
    return any(cost(product, 2, 4) != cost(product, 4, 4) for product in products)


def _free_sites(config: QuantConfig, architecture: Any, sites: set[str]) -> tuple[str, ...]:
    """The sites whose width is for the program to choose."""
    narrow, wide = (recipe_of(architecture, dataclasses.replace(config, a_bits=bits)) for bits in (2, 8))
    free = []
    for site in sorted(sites):
        one, other = narrow.at(site), wide.at(site)
        if one is not None and other is not None and one.a_bits != other.a_bits and not site.endswith("/softmax"):
            free.append(site)
    return tuple(free)


def _rules(
    config: QuantConfig,
    architecture: Any,
    budget: Budget,
    products: Sequence[Product],
    damages: dict[str, dict[int, float]],
) -> tuple[Rule, ...]:
    """The best widths as rules, one a site."""
    recipe = recipe_of(architecture, config)
    wide = recipe_of(architecture, dataclasses.replace(config, w_bits=8 if config.w_bits != 8 else 7))

    def widths_of(path: str, site: str, weights: bool) -> tuple[int, ...]:
        choice, other = recipe.at(site), wide.at(site)
        if choice is None or other is None:
            return (FLOAT_WIDTH,)
        if weights:
            return WIDTHS if choice.w_bits != other.w_bits else (choice.w_bits,)
        most = config.grid_bits or WIDTHS[-1]
        return tuple(bits for bits in WIDTHS if bits <= most) if path in damages else (choice.a_bits,)

    cost = COSTS[budget.name]
    options: list[list[Option]] = []
    losses: list[list[float]] = []
    costs: list[list[float]] = []
    allowed = 0.0
    for product in products:
        layer = product.left.removesuffix("/input")
        lefts = widths_of(product.left, product.left, False)
        rights = (
            widths_of(layer, product.left, True)
            if product.right is None
            else widths_of(product.right, product.right, False)
        )
        options.append([Option(left, right) for left in lefts for right in rights])
        other = layer if product.right is None else product.right

        def damage(path: str, bits: int) -> float:
            return damages.get(path, {}).get(bits, 0.0)

        losses.append([damage(product.left, o.left) + damage(other, o.right) for o in options[-1]])
        costs.append([cost(product, o.left, o.right) for o in options[-1]])
        own = (config.a_bits, config.w_bits if product.right is None else config.a_bits)
        uniform = [
            float(widths[0]) if len(widths) == 1 else budget.width or float(width)
            for widths, width in zip((lefts, rights), own, strict=True)
        ]
        allowed += cost(product, *uniform)
    rules = []
    for product, of_product, index in zip(products, options, solve(losses, costs, allowed), strict=True):
        chosen = of_product[index]
        left = chosen.left if product.left in damages else None
        if product.right is None:
            rules.append(Rule(re.escape(product.left), a_bits=left, w_bits=chosen.right))
            continue
        if left is not None:
            rules.append(Rule(re.escape(product.left), a_bits=left))
        if product.right in damages:
            rules.append(Rule(re.escape(product.right), a_bits=chosen.right))
    return tuple(rules)
