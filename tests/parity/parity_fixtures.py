"""Readers of the reference numbers and builders of the modules they belong to; every size comes from the files."""

import json

import numpy as np
import torch
from safetensors.torch import load_file

from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
from prismatic.models.action_heads import L1RegressionActionHead
from prismatic.models.projectors import ProprioProjector

# The reference decodes JPEG with the fast integer DCT, this code with the accurate one: about 1 grey level on average.
OTHER_DCT = {"most": 20, "mean": 2.0}


def read_json(path):
    return json.loads(path.read_text())


def tensors(path):
    """Safetensors file as a dict; the float16 storage of exact values is widened to float32."""
    return {k: v.float() if v.dtype == torch.float16 else v for k, v in load_file(str(path)).items()}


def below(values, prefix):
    """Entries of a dict whose keys start with `prefix`, without it; at least one must be there."""
    found = {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
    assert found, f"no reference numbers below {prefix!r}"
    return found


def assert_close(actual, expected, atol, what=""):
    """Equal shapes and no element further apart than `atol`."""
    assert tuple(actual.shape) == tuple(expected.shape), what
    difference = (actual.detach().double() - expected.double()).abs().max().item()
    assert difference <= atol, f"{what}: differs by {difference:.3g}, allowed are {atol:.3g}"


def assert_gradient_close(actual, expected, tolerance, what=""):
    """`assert_close` for sums over the batch: beyond 1 the tolerance grows with the largest element.

    The stored float32 sums themselves are that far from a float64 computation.
    """
    assert_close(actual, expected, tolerance * max(1.0, expected.abs().max().item()), what)


def golden_head(folder, kind, **options):
    """(head in eval mode, proprio projector) with the stored weights; widths and block count follow from them."""
    weights = tensors(folder / f"{kind}_head.safetensors")
    blocks = {int(k.split(".")[2]) for k in weights if ".mlp_resnet_blocks." in k}
    action_dim, hidden_dim = weights["model.fc2.weight"].shape
    head = L1RegressionActionHead(
        hidden_dim=hidden_dim,
        action_dim=action_dim,
        num_blocks=max(blocks) + 1,
        use_pro_version=kind == "pro",
        **options,
    )
    head.load_state_dict(weights)
    proprio = tensors(folder / "proprio_projector.safetensors")
    projector = ProprioProjector(hidden_dim, proprio["fc1.weight"].shape[1])
    projector.load_state_dict(proprio)
    return head.eval(), projector


def _tower(facts):
    names = ("image_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_hidden_dim", "norm_eps")
    patches_only = facts["pos_embed_on_patches_only"] or not facts["num_prefix_tokens"]
    return {
        **{name: facts[name] for name in names},
        "activation": "gelu_tanh" if "tanh" in facts["activation"] else "gelu",
        "class_token": facts["has_class_token"],
        "reg_tokens": facts["num_reg_tokens"],
        "layer_scale": facts["layer_scale"],
        "attention_pool": facts["attention_pool"],
        "pos_embed": "patches" if patches_only else "all",
    }


def golden_model(folder):
    """The VLM of `prismatic_tiny` in eval mode; embedding rows that do not occur are zero."""
    meta, weights = read_json(folder / "meta.json"), tensors(folder / "weights.safetensors")
    config = OpenVLAConfig(
        **read_json(folder / "config.json"),
        vision_towers=[_tower(facts) for facts in meta["vision_towers"]],
        num_images_in_input=meta["num_images"],
        num_action_queries=len(weights["action_queries.weight"]),
    )
    model = OpenVLAForActionPrediction(config).eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert set(missing) == set(meta["dropped_from_weights"])
    assert not unexpected
    rows = tensors(folder / "embedding_rows_used.safetensors")
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table.zero_()
        table[rows["ids"]] = rows["rows"]
    return model


def assert_levels(actual, expected, most, fraction=1.0, mean=np.inf, what=""):
    """uint8 images: largest and mean difference in grey levels, and the fraction of values that differ at all."""
    assert actual.dtype == expected.dtype == np.uint8 and actual.shape == expected.shape, what
    difference = np.abs(actual.astype(int) - expected.astype(int))
    assert difference.max() <= most, f"{what}: differs by {difference.max()} grey levels, allowed are {most}"
    assert (difference > 0).mean() <= fraction, f"{what}: {(difference > 0).mean():.3g} of the values differ"
    assert difference.mean() <= mean, f"{what}: differs by {difference.mean():.3g} grey levels on average"
