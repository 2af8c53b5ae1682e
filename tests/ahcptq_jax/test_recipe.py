"""The recipe: what every tensor of real models gets, and that no rule is idle."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from ahcptq_jax import METHODS, QuantConfig
from ahcptq_jax.architectures.sam_vit import RULES, SAM_VIT
from ahcptq_jax.architectures.sites import flatten, intercept_sites
from ahcptq_jax.recipe import recipe_of, site_kind, weight_path
from ahcptq_jax.rules import Rule
from sam_flax.config import CONFIGS, SamConfig
from sam_flax.sam import Sam

ENCODER_BLOCK = {
    "attn/qkv/input": "grouped",
    "attn/q": "uniform",
    "attn/k": "uniform",
    "attn/v": "uniform",
    "attn/softmax": "log2",
    "attn/proj/input": "uniform",
    "mlp/lin1/input": "grouped",
    "mlp/lin2/input": "hybrid",
}
NECK = {"conv1/input": "uniform", "conv2/input": "uniform"}
DECODER_ATTENTION = {
    "q_proj/input": "grouped",
    "k_proj/input": "grouped",
    "v_proj/input": "grouped",
    "q": "uniform",
    "k": "uniform",
    "v": "uniform",
    "softmax": "log2",
    "out_proj/input": "uniform",
}
DECODER_MLP = {"lin1/input": "grouped", "lin2/input": "hybrid"}


def expected_kinds(config: SamConfig) -> dict[str, str]:
    """The official recipe written out for a model, site by site."""
    places = [(f"image_encoder/blocks_{i}", ENCODER_BLOCK) for i in range(config.depth)]
    places.append(("image_encoder/neck", NECK))
    transformer = "mask_decoder/transformer"
    for i in range(config.decoder_depth):
        for name in ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token"):
            places.append((f"{transformer}/layers_{i}/{name}", DECODER_ATTENTION))
        places.append((f"{transformer}/layers_{i}/mlp", DECODER_MLP))
    places.append((f"{transformer}/final_attn_token_to_image", DECODER_ATTENTION))
    return {f"{place}/{site}": kind for place, kinds in places for site, kind in kinds.items()}


def sites_of(config: SamConfig) -> list[str]:
    """Paths of all sites of a model, by abstract evaluation."""
    sam, paths = Sam(config), []

    def note(path, value):
        paths.append(path)
        return value

    with intercept_sites(note):
        size = config.img_size
        jax.eval_shape(sam.init, jax.random.key(0), jnp.zeros((1, size, size, 3)), None, jnp.zeros((1, 4)))
    return paths


@pytest.fixture(scope="module", params=["mini", "vit_b"])
def model(request):
    config = CONFIGS[request.param]
    # Four blocks have every kind of site; the other eight would only cost time.
    config = dataclasses.replace(config, depth=4, global_attn_indexes=(1, 3))
    return config, sites_of(config)


def test_every_site_gets_the_kind_of_the_method_and_nothing_else_is_quantized(model):
    config, sites = model
    found = {site: kind for site in sites if (kind := site_kind(site, QuantConfig(), "sam_vit")) is not None}
    assert found == expected_kinds(config)
    left = {site for site in sites if site not in found}
    # Attention's operands are no tensors of their own; the rest stays in floating point.
    patterns = (r".*/operands", r"mask_decoder/(output_hypernetworks_mlps_\d|iou_prediction_head)/layers_\d/input")
    assert all(any(re.fullmatch(pattern, site) for pattern in patterns) for site in left), left
    assert any("hypernetworks" in site for site in left) and any("iou_prediction_head" in site for site in left)


def test_every_rule_matches_a_site(model):
    _, sites = model
    assert not recipe_of(SAM_VIT, QuantConfig()).idle(sites)


def test_no_site_is_claimed_by_two_rules(model):
    _, sites = model
    for site in sites:
        assert sum(rule.matches(site) for rule in RULES) <= 1, site


def test_input_sites_name_the_layer_whose_weight_is_quantized(model):
    config, sites = model
    weights = {path for site in expected_kinds(config) if (path := weight_path(site)) is not None}
    kernels = {path.removesuffix("/kernel") for path in _kernels(config)}
    assert weights <= kernels
    kept = kernels - weights
    assert all(
        re.match(r"image_encoder/patch_embed|prompt_encoder|mask_decoder/(output_|iou_prediction_head)", path)
        for path in kept
    ), kept
    assert weight_path("image_encoder/blocks_0/attn/q") is None


def _kernels(config: SamConfig) -> list[str]:
    sam = Sam(config)
    shapes = jax.eval_shape(sam.init_params, jax.random.key(0))
    return [path for path in flatten(shapes) if path.endswith("/kernel")]


def test_big_looks_at_the_attentions_from_tokens_to_the_image(model):
    config, sites = model
    keys = {site.removesuffix("/k") for site in sites if site.endswith("/k")}
    found = {path for path in keys if re.fullmatch(SAM_VIT.bimodal, path)}
    transformer = "mask_decoder/transformer"
    layers = {f"{transformer}/layers_{i}/cross_attn_token_to_image" for i in range(config.decoder_depth)}
    assert found == layers | {f"{transformer}/final_attn_token_to_image"}


@pytest.mark.parametrize(
    ("switches", "replaced"),
    [
        ({}, ()),
        ({"hluq": False}, ("hybrid",)),
        ({"cag": False}, ("grouped",)),
        ({"agq": False}, ("log2",)),
        ({"big": False}, ()),
        (METHODS["ahcptq"], ()),
        (METHODS["ptq4sam_s"], ("hybrid", "grouped")),
        (METHODS["minmax"], ("hybrid", "grouped", "log2")),
        (METHODS["percentile"], ("hybrid", "grouped", "log2")),
        (METHODS["omse"], ("hybrid", "grouped", "log2")),
        (METHODS["qdrop"], ("hybrid", "grouped", "log2")),
        (METHODS["ptq4sam_l"], ("hybrid", "grouped")),
    ],
)
def test_a_switch_turns_its_kind_into_uniform(switches, replaced):
    config = QuantConfig(**switches)
    for site, kind in expected_kinds(CONFIGS["mini"]).items():
        assert site_kind(site, config, "sam_vit") == ("uniform" if kind in replaced else kind), site


@pytest.mark.parametrize(
    "path",
    [
        "image_encoder/blocks_0/attn/operands",
        "image_encoder/patch_embed/proj/input",
        "prompt_encoder/mask_downscaling/conv1/input",
        "mask_decoder/output_upscaling/conv1/input",
        "prefix/image_encoder/blocks_0/attn/q",
        "image_encoder/blocks_0/attn/q/more",
    ],
)
def test_other_paths_stay_in_floating_point(path):
    assert site_kind(path, QuantConfig(), "sam_vit") is None


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"w_bits": 9}, "w_bits=9 must be a width from 2 to 8"),
        ({"w_bits": 1}, "w_bits=1 must be a width from 2 to 8"),
        ({"a_bits": 1}, "a_bits=1 must be a width from 2 to 8"),
        ({"a_bits": 9}, "a_bits=9 must be a width from 2 to 8"),
        ({"a_bits": 4.0}, "a_bits=4.0 must be a whole number"),
        ({"w_bits": True}, "w_bits=True must be a whole number"),
        ({"hluq": "no"}, "hluq='no' must be True or False"),
        ({"groups": -1}, "groups=-1 must be 0"),
        ({"group_metric": "cosine"}, "group_metric='cosine' is unknown; choose one of paper, normalized, range"),
        ({"softmax_rows": -1}, "softmax_rows=-1"),
        ({"hluq_rows": -1}, "hluq_rows=-1"),
        ({"prompts_per_image": 0}, "prompts_per_image=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 must be a number from 0"),
        ({"seed": 2**40}, "must be a number from 0 to 2147483646"),
    ],
)
def test_a_bad_configuration_gets_one_sentence(values, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        QuantConfig(**values)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


# --- Rules of one's own -----------------------------------------------------------------------------------------------

LIN2 = "image_encoder/blocks_0/mlp/lin2/input"


def test_rules_of_ones_own_come_first_and_leave_the_rest_to_the_next():
    rules = (
        Rule(r"image_encoder/blocks_0/.*", a_bits=8),
        Rule(r".*/mlp/lin2/input", w_bits=3),
        Rule(r"image_encoder/blocks_1/attn/softmax", kind="uniform"),
        Rule(r"image_encoder/neck/.*", kind="float"),
    )
    recipe = recipe_of(SAM_VIT, QuantConfig(rules=rules, w_bits=4, a_bits=5))
    assert recipe.at(LIN2) == ("hybrid", 8, 3)
    assert recipe.at(LIN2.replace("blocks_0", "blocks_1")) == ("hybrid", 5, 3)
    assert recipe.at("image_encoder/blocks_0/attn/softmax") == ("log2", 8, 4)
    assert recipe.at("image_encoder/blocks_1/attn/softmax") == ("uniform", 5, 4)
    assert recipe.at("image_encoder/neck/conv1/input") is None
    # The method's switches are of the architecture's rules: what the user says is meant.
    own = QuantConfig(hluq=False, rules=(Rule(LIN2, kind="hybrid"),))
    assert recipe_of(SAM_VIT, own).at(LIN2) == ("hybrid", 4, 4)


def test_what_no_rule_names_and_what_rules_name_in_vain_is_told(model):
    _, sites = model
    recipe = recipe_of(SAM_VIT, QuantConfig(rules=(Rule("image_encoder/blocks_99/.*", a_bits=8),)))
    assert [rule.pattern for rule in recipe.idle(sites)] == ["image_encoder/blocks_99/.*"]
    named = [site for site in sites if not site.endswith("/operands")]
    assert not recipe.unnamed(named)
    assert recipe.unnamed(["prompt_encoder/new/input", LIN2]) == ["prompt_encoder/new/input"]


@pytest.mark.parametrize(
    ("rules", "sentence"),
    [
        ("x", "rules='x' must be a tuple of ahcptq_jax.Rule"),
        (("x",), "rules has 'x', which is no ahcptq_jax.Rule"),
        ((Rule("x", a_bits=9),), "The rule 'x' has a_bits=9, which must be a width from 2 to 8"),
        ((Rule("x", w_bits=True),), "The rule 'x' has w_bits=True, which must be"),
        (({"pattern": "x", "bits": 4},), "which is no ahcptq_jax.Rule"),
    ],
)
def test_a_bad_rule_gets_a_sentence(rules, sentence):
    with pytest.raises(ValueError, match=sentence):
        QuantConfig(rules=rules)


def test_a_pattern_that_is_none_gets_a_sentence():
    with pytest.raises(ValueError, match=r"The rule '\(' is no regular expression"):
        Rule("(")


def test_an_unknown_kind_gets_a_sentence():
    with pytest.raises(ValueError, match="Quantizer kind 'ternary' is unknown"):
        recipe_of(SAM_VIT, QuantConfig(rules=(Rule("x", "ternary"),)))


def test_rules_survive_a_file():
    config = QuantConfig(rules=(Rule("a/.*", "uniform", 3, 5),), transforms=("harder:2",))
    assert QuantConfig(**dataclasses.asdict(config)) == config


def test_the_shapes_of_the_parameters_tell_all_sites(model):
    config, sites = model
    found = SAM_VIT.sites(Sam(config))
    assert set(found) == {site for site in sites if not site.endswith("/operands")}
    assert {path for path, size in found.items() if size is None} == {s for s in sites if s.endswith("/softmax")}
