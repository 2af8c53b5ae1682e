"""Parameters that carry their configuration, and trees by path."""

import copy
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam_flax import Sam, load_sam, save_params
from sam_flax.files.trees import ParamTree, by_path, nested


@pytest.fixture
def tree(sam_tiny) -> ParamTree:
    config, params = sam_tiny
    return ParamTree(params, dataclasses.replace(config, pixel_mean=(1.0, 2.0, 3.0)))


def test_load_sam_returns_one(tree, tmp_path):
    save_params(tmp_path / "own", tree.config, tree)
    sam, params = load_sam(tmp_path / "own")
    assert isinstance(params, ParamTree) and params.config == sam.config == tree.config


def test_transformations_keep_the_configuration(tree):
    doubled = jax.tree.map(lambda a, b: np.asarray(a) + np.asarray(b), tree, tree)
    jitted = jax.jit(lambda t: jax.tree.map(lambda a: 2 * a, t))(tree)
    gradient = jax.jit(jax.grad(lambda t: sum(jnp.sum(a**2) for a in jax.tree.leaves(t))))(tree)
    for result in (doubled, jitted, gradient):
        assert isinstance(result, ParamTree) and result.config == tree.config
        jax.tree.map(np.testing.assert_array_equal, result, doubled)
    for again in (pickle.loads(pickle.dumps(jax.device_get(tree))), copy.copy(tree), copy.deepcopy(tree)):
        assert isinstance(again, ParamTree) and again.config == tree.config
    with pytest.raises(ValueError):
        jax.tree.map(lambda a, b: a, tree, ParamTree(tree, dataclasses.replace(tree.config, mask_threshold=1.0)))


def test_it_is_a_dict_like_any_other(tree):
    plain = {**tree}
    assert type(plain) is dict and isinstance(tree, dict) and tree == plain
    # The same leaves in the same order under the same paths.
    paths, values = zip(*jax.tree_util.tree_leaves_with_path(tree), strict=True)
    plain_paths, plain_values = zip(*jax.tree_util.tree_leaves_with_path(plain), strict=True)
    assert paths == plain_paths and all(a is b for a, b in zip(values, plain_values, strict=True))
    image = jnp.zeros((1, tree.config.img_size, tree.config.img_size, 3))
    encode = jax.jit(lambda p: Sam(tree.config).apply({"params": p}, image, method="encode_image"))
    a, b = (encode(params) for params in (tree, plain))
    assert (a == b).all()


def test_by_path_and_back(tree):
    flat = by_path(tree)
    assert all("/" in path and not isinstance(leaf, dict) for path, leaf in flat.items())
    assert nested(flat) == {**tree}
    assert by_path({"a": {1: 2}, "b": {}}) == {"a/1": 2}
