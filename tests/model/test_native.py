"""Native Prismatic checkpoints: which file is read, renaming, strict loading, comparison of configurations."""

import hashlib
import json
import re
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from model_fixtures import small_config, small_model
from safetensors.torch import save_file

from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
from prismatic.models.native import (
    check_native_config,
    find_native_checkpoint,
    load_native_weights,
    native_to_hf_state_dict,
)
from prismatic.models.presets import build_config

TOWER = {"image_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_hidden_dim": 24}
SINGLE = {
    "vision_backbone_id": "siglip-vit-so400m",
    "arch_specifier": "no-align+gelu-mlp",
    "num_images_in_input": 1,
    "vision_towers": [{**TOWER, "attention_pool": True}],
}
DINO, SIGLIP = "vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"
EMBEDDINGS, LM_HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
QUERIES = "action_queries.weight"
STEP = "step-020792-epoch-01-loss=0.5268.pt"


def native_components(state, fused=True, second="siglip"):
    """Inverse of the rename table: state dict of our model -> the "model" entry of a native file."""
    towers = {"featurizer": "dino_featurizer" if fused else "featurizer", "fused_featurizer": f"{second}_featurizer"}
    layers = {"fc1": "0", "fc2": "2", "fc3": "4"}
    native = {"vision_backbone": OrderedDict(), "llm_backbone": OrderedDict(), "projector": OrderedDict()}
    for key, value in state.items():
        module, _, rest = key.partition(".")
        first, _, rest_of_rest = rest.partition(".")
        if module == "vision_backbone":
            name = rest_of_rest.replace("scale_factor", "gamma")
            native["vision_backbone"][f"{towers[first]}.{name}"] = value
        elif module == "language_model":
            native["llm_backbone"][f"llm.{rest}"] = value
        elif module == "projector":
            native["projector"][f"projector.{layers[first]}.{rest_of_rest}"] = value
        else:
            assert key == QUERIES
    return native


def write_native(folder, components, name=STEP, **entries):
    """Folder with `checkpoints/<name>`; the layout of a native run."""
    file = folder / "checkpoints" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": components, **entries}, file)
    return file


def clones(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def distinct_model(seed=1, **overrides):
    """A model without constant tensors: every one that is not copied shows."""
    model = small_model(seed=seed, **overrides)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


@pytest.fixture
def source():
    return distinct_model()


@pytest.fixture
def target():
    return small_model(seed=2)


@pytest.fixture
def components(source):
    return native_components(source.state_dict())


def assert_loaded(target, source, queries):
    loaded, expected = target.state_dict(), source.state_dict()
    assert torch.equal(loaded.pop(QUERIES), queries)
    assert all(torch.equal(value, expected[key]) for key, value in loaded.items())
    assert target.language_model.lm_head.weight is target.get_input_embeddings().weight


# ------------------------------------------------------------------------------------------- finding the file


def test_newest_numbered_file(tmp_path):
    """The number decides, not the name's order, the time of writing or `latest`."""
    names = ["step-1000000-epoch-09-loss=0.1.pt", STEP, "step-999999.pt", "latest-checkpoint.pt", "steps.pt"]
    for name in names:
        write_native(tmp_path, {}, name)
    assert find_native_checkpoint(tmp_path).name == names[0]
    assert find_native_checkpoint(str(tmp_path / "checkpoints")).name == names[0]
    assert find_native_checkpoint(tmp_path / "checkpoints" / STEP).name == STEP


def test_latest_only_without_numbers(tmp_path):
    torch.save({}, tmp_path / "latest-checkpoint.pt")
    torch.save({}, tmp_path / "other.pt")
    assert find_native_checkpoint(tmp_path) == tmp_path / "latest-checkpoint.pt"


@pytest.mark.parametrize("inner", ["checkpoints", ""])
def test_folder_without_checkpoints(tmp_path, inner):
    place = tmp_path / inner
    place.mkdir(exist_ok=True)
    (place / "other.pt").touch()
    (place / "step-000100.pt").mkdir()
    with pytest.raises(FileNotFoundError, match=rf"{place}: expected step-<number>.*found \['other.pt'"):
        find_native_checkpoint(tmp_path)


def test_path_of_another_kind(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent does not exist, expected"):
        find_native_checkpoint(tmp_path / "absent")
    (tmp_path / "model.bin").touch()
    with pytest.raises(ValueError, match=r"model\.bin: expected .*found a file ending in '\.bin'"):
        find_native_checkpoint(tmp_path / "model.bin")


def test_two_files_of_one_step(tmp_path):
    for name in ("step-000002-epoch-00-loss=1.0.pt", "step-2-again.pt", "step-000001.pt"):
        write_native(tmp_path, {}, name)
    with pytest.raises(ValueError, match="expected one file of step 2.*again"):
        find_native_checkpoint(tmp_path)


# --------------------------------------------------------------------------------------------------- renaming


def test_rename_table():
    native = {
        "vision_backbone": ["dino_featurizer.blocks.0.ls1.gamma", "siglip_featurizer.attn_pool.q.weight"],
        "llm_backbone": ["llm.model.layers.0.self_attn.q_proj.bias", "llm.lm_head.weight"],
        "projector": ["projector.0.weight", "projector.2.bias", "projector.4.weight"],
        "downsampler": [],
    }
    expected = [
        "vision_backbone.featurizer.blocks.0.ls1.scale_factor",
        "vision_backbone.fused_featurizer.attn_pool.q.weight",
        "language_model.model.layers.0.self_attn.q_proj.bias",
        "language_model.lm_head.weight",
        "projector.fc1.weight",
        "projector.fc2.bias",
        "projector.fc3.weight",
    ]
    tensors = {component: {key: torch.zeros(1) for key in keys} for component, keys in native.items()}
    renamed = native_to_hf_state_dict(tensors)
    assert list(renamed) == expected
    assert renamed["projector.fc1.weight"] is tensors["projector"]["projector.0.weight"]


def test_rename_of_full_size_keys(golden_dir):
    """Inverse and forward rename give exactly the published model's keys."""
    with torch.device("meta"):
        state = OpenVLAForActionPrediction(build_config("qwen25-0_5b")).state_dict()
    renamed = native_to_hf_state_dict(native_components(state))
    assert renamed.keys() == state.keys() - {QUERIES}
    assert renamed.keys() == json.loads((golden_dir / "keys" / "merged_model.json").read_text()).keys() - {QUERIES}
    assert all(renamed[key].shape == state[key].shape for key in renamed)


@pytest.mark.parametrize(
    ("component", "key"),
    [
        ("projector", "projector.weight"),  # the linear projector, which we do not have
        ("projector", "projector.1.weight"),
        ("llm_backbone", "model.embed_tokens.weight"),
        ("vision_backbone", "theia_featurizer.pos_embed"),
        ("vision_backbone", "featurizer"),
        ("action_head", "fc1.weight"),
    ],
)
def test_unknown_native_key(component, key):
    with pytest.raises(ValueError, match=re.escape(f"unknown native keys ['{component}.{key}']")):
        native_to_hf_state_dict({component: {key: torch.zeros(1)}})


def test_unknown_keys_are_listed_up_to_a_limit():
    with pytest.raises(ValueError, match=r"'head\.7', \.\.\.\] \(20 in all\)"):
        native_to_hf_state_dict({"head": {str(i): torch.zeros(1) for i in range(20)}})


def test_two_keys_of_one_meaning():
    towers = {"featurizer.pos_embed": torch.zeros(1), "dino_featurizer.pos_embed": torch.ones(1)}
    with pytest.raises(ValueError, match="two native keys stand for `vision_backbone.featurizer.pos_embed`"):
        native_to_hf_state_dict({"vision_backbone": towers})


# ---------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("lm_head", [True, False])
def test_round_trip_fused(tmp_path, source, target, components, lm_head):
    if not lm_head:
        del components["llm_backbone"]["llm.lm_head.weight"]
    file = write_native(tmp_path, components, optimizer={"state": {0: {"step": torch.tensor(1.0)}}, "lr": 1e-4})
    queries, pointers = target.action_queries.weight.clone(), [p.data_ptr() for p in target.parameters()]
    report = load_native_weights(target, tmp_path)
    assert_loaded(target, source, queries)
    assert [p.data_ptr() for p in target.parameters()] == pointers
    assert report.missing == ((QUERIES,) if lm_head else (QUERIES, LM_HEAD))
    assert (report.file, report.vision_files) == (file, ())
    assert report.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def test_round_trip_single_tower(tmp_path):
    source, target = distinct_model(**SINGLE), small_model(seed=2, **SINGLE)
    queries = target.action_queries.weight.clone()
    file = write_native(tmp_path, native_components(source.state_dict(), fused=False))
    assert load_native_weights(target, file).missing == (QUERIES,)
    assert_loaded(target, source, queries)


def test_round_trip_clip_tower(tmp_path):
    clip = {"vision_backbone_id": "dinoclip-vit-l-336px"}
    source, target = distinct_model(**clip), small_model(seed=2, **clip)
    write_native(tmp_path, native_components(source.state_dict(), second="clip"))
    queries = target.action_queries.weight.clone()
    load_native_weights(target, tmp_path)
    assert_loaded(target, source, queries)


def test_weights_take_the_models_dtype(tmp_path, source, components):
    target = small_model(seed=2).to(torch.bfloat16)
    write_native(tmp_path, components)
    load_native_weights(target, tmp_path)
    expected = source.state_dict()
    assert target.state_dict().keys() == expected.keys()
    for key, value in target.state_dict().items():
        assert value.dtype == torch.bfloat16
        assert key == QUERIES or torch.equal(value, expected[key].to(torch.bfloat16))


def test_untied_model_needs_both_tables(tmp_path):
    text = small_config().text_config.to_dict() | {"tie_word_embeddings": False}
    source, target = distinct_model(text_config=text), small_model(seed=2, text_config=text)
    components = native_components(source.state_dict())
    write_native(tmp_path, components)
    assert load_native_weights(target, tmp_path).missing == (QUERIES,)
    assert torch.equal(target.language_model.lm_head.weight, source.language_model.lm_head.weight)
    assert not torch.equal(target.language_model.lm_head.weight, target.get_input_embeddings().weight)
    del components["llm_backbone"]["llm.lm_head.weight"]
    write_native(tmp_path, components)
    with pytest.raises(ValueError, match=re.escape(f"missing ['{LM_HEAD}']")):
        load_native_weights(target, tmp_path)


def fail_to_load(target, path, match, kind=ValueError, **options):
    """Loading fails with the message and leaves the model as it was."""
    before = clones(target)
    with pytest.raises(kind, match=match):
        load_native_weights(target, path, **options)
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


def test_tied_tables_must_be_equal(tmp_path, target, components):
    components["llm_backbone"]["llm.lm_head.weight"] = components["llm_backbone"]["llm.lm_head.weight"] + 1
    write_native(tmp_path, components)
    fail_to_load(target, tmp_path, f"expected equal {LM_HEAD} and {EMBEDDINGS}")


def test_unknown_key_names_the_file(tmp_path, target, components):
    components["projector"]["projector.6.weight"] = torch.zeros(1)
    file = write_native(tmp_path, components)
    fail_to_load(target, tmp_path, re.escape(f"{file}: unknown native keys ['projector.projector.6.weight']"))


@pytest.mark.parametrize("extra", ["llm.model.layers.2.mlp.up_proj.weight", "llm.model.rotary_emb.inv_freq"])
def test_unexpected_key(tmp_path, target, components, extra):
    components["llm_backbone"][extra] = torch.zeros(1)
    write_native(tmp_path, components)
    fail_to_load(target, tmp_path, rf"{STEP}.*unexpected \['language_model\.{extra.removeprefix('llm.')}'\]")


@pytest.mark.parametrize(
    ("component", "key", "name"),
    [
        ("llm_backbone", "llm.model.embed_tokens.weight", EMBEDDINGS),
        ("projector", "projector.4.bias", "projector.fc3.bias"),
        # Never run, but stored by every native model that stores the tower.
        ("vision_backbone", "siglip_featurizer.attn_pool.latent", "vision_backbone.fused_featurizer.attn_pool.latent"),
        ("vision_backbone", "dino_featurizer.norm.bias", "vision_backbone.featurizer.norm.bias"),
        (
            "vision_backbone",
            "dino_featurizer.blocks.1.ls2.gamma",
            "vision_backbone.featurizer.blocks.1.ls2.scale_factor",
        ),
    ],
)
def test_missing_key(tmp_path, target, components, component, key, name):
    del components[component][key]
    write_native(tmp_path, components)
    fail_to_load(target, tmp_path, rf"{STEP}.*missing \['{name}'\], unexpected \[\]")


def test_missing_component(tmp_path, target, components):
    """The file of an alignment stage holds the projector alone."""
    del components["llm_backbone"]
    write_native(tmp_path, components)
    fail_to_load(target, tmp_path, r"with components \['projector', 'vision_backbone'\]: .*\] \(26 in all\)")


def test_wrong_shapes(tmp_path, target, components):
    """Another vocabulary and another tower width; every one is listed."""
    components["llm_backbone"]["llm.model.embed_tokens.weight"] = torch.zeros(60, 32)
    components["projector"]["projector.2.bias"] = torch.zeros(31)
    write_native(tmp_path, components)
    fail_to_load(target, tmp_path, re.escape(f"{EMBEDDINGS}: found shape (60, 32), expected (50, 32)"))
    fail_to_load(target, tmp_path, re.escape("projector.fc2.bias: found shape (31,), expected (32,)"))


def test_wrong_dtype(tmp_path, target, components):
    components["projector"]["projector.2.bias"] = torch.zeros(32, dtype=torch.int8)
    write_native(tmp_path, components)
    fail_to_load(target, tmp_path, r"projector\.fc2\.bias: found torch\.int8, expected a floating-point dtype")


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), torch.float32), (1e6, torch.float16)])
def test_non_finite_values(tmp_path, target, components, value, dtype):
    bias = components["projector"]["projector.2.bias"].clone()
    bias[3] = value
    components["projector"]["projector.2.bias"] = bias
    write_native(tmp_path, components)
    with pytest.raises(ValueError, match=rf"{STEP}.*projector\.fc2\.bias holds NaN or infinity as {dtype}"):
        load_native_weights(target.to(dtype), tmp_path)


def test_model_without_memory(tmp_path, components):
    write_native(tmp_path, components)
    with torch.device("meta"):
        target = OpenVLAForActionPrediction(small_config())
    with pytest.raises(ValueError, match="meta device"):
        load_native_weights(target, tmp_path)


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.999])
def test_truncated_file(tmp_path, target, components, kept):
    file = write_native(tmp_path, components)
    content = file.read_bytes()
    file.write_bytes(content[: kept if kept > 1 else int(kept * len(content))])
    fail_to_load(target, tmp_path, f"{STEP}: truncated, or not a file written by torch.save" if kept else "is empty")


def test_objects_are_not_unpickled(tmp_path, target, components):
    write_native(tmp_path, components, run=tmp_path)
    fail_to_load(target, tmp_path, f"{STEP}: expected nothing but tensors, found other objects")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (torch.zeros(1), 'components under "model", found Tensor'),
        ({"state_dict": {}, "step": 3}, r"found \['state_dict', 'step'\]"),
        ({"model": {"projector": torch.zeros(1)}}, r"something else at \['projector'\]"),
        (
            {"model": {"projector": {"projector.0.weight": 1}}},
            r"something else at \['projector\.projector\.0\.weight'\]",
        ),
    ],
)
def test_content_of_another_kind(tmp_path, target, content, match):
    torch.save(content, tmp_path / "step-1.pt")
    fail_to_load(target, tmp_path, rf"step-1\.pt: .*{match}")


# ---------------------------------------------------------------------------------------- frozen vision towers


@pytest.fixture
def frozen(tmp_path, components):
    """Native folder whose file leaves the vision towers out."""
    del components["vision_backbone"]
    write_native(tmp_path / "run", components)
    return tmp_path / "run"


def our_vision(model):
    return {key: value for key, value in clones(model).items() if key.startswith("vision_backbone.")}


def timm_state(model, tower):
    """State dict of a tower under timm's names, with a classification head."""
    state = clones(getattr(model.vision_backbone, tower))
    return {k.replace("scale_factor", "gamma"): v for k, v in state.items()} | {"head.weight": torch.zeros(2, 16)}


def timm_files(folder, model):
    """One folder per tower with timm's names; the SigLIP one carries its tag."""
    for tower, name in (("featurizer", DINO), ("fused_featurizer", f"{SIGLIP}.webli")):
        (folder / name).mkdir(parents=True)
        save_file(timm_state(model, tower), folder / name / "model.safetensors")


def test_vision_from_a_file_or_shards(tmp_path, frozen, source, target):
    queries, weights = target.action_queries.weight.clone(), our_vision(source)
    save_file(weights | {"language_model.other": torch.zeros(1)}, tmp_path / "towers.safetensors")
    report = load_native_weights(target, frozen, tmp_path / "towers.safetensors")
    assert_loaded(target, source, queries)
    assert report.vision_files == (tmp_path / "towers.safetensors",)
    target, keys = small_model(seed=3), list(weights)
    queries = target.action_queries.weight.clone()
    for part in (1, 2):
        shard = {key: weights[key] for key in keys[part - 1 :: 2]}
        save_file(shard, tmp_path / f"model-0000{part}-of-00002.safetensors")
    load_native_weights(target, frozen, tmp_path)
    assert_loaded(target, source, queries)


@pytest.mark.parametrize("explicit", [True, False])
def test_vision_from_timm_files(tmp_path, frozen, source, target, explicit):
    """Beside the run's file they are found by themselves; the identity covers them."""
    folder = tmp_path / "towers" if explicit else frozen / "vision_backbone"
    timm_files(folder, source)
    queries = target.action_queries.weight.clone()
    report = load_native_weights(target, find_native_checkpoint(frozen), *([folder] if explicit else []))
    assert_loaded(target, source, queries)
    files = [report.file, folder / DINO / "model.safetensors", folder / f"{SIGLIP}.webli" / "model.safetensors"]
    assert report.vision_files == tuple(files[1:])
    assert report.sha256 == hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def test_positions_of_another_image_size(tmp_path, frozen, source, target):
    """timm publishes DINOv2 for 518 px; the table is resampled the way timm builds the tower for 224 px."""
    folder = frozen / "vision_backbone"
    timm_files(folder, source)
    state = timm_state(source, "featurizer")
    table = torch.randn(1, 5 * 5, 16, generator=torch.Generator().manual_seed(0))
    save_file(state | {"pos_embed": table}, folder / DINO / "model.safetensors")
    load_native_weights(target, frozen)
    image = table[0].T.reshape(1, 16, 5, 5)
    expected = F.interpolate(image, size=(2, 2), mode="bicubic", antialias=True)[0].flatten(1).T
    assert torch.equal(target.vision_backbone.featurizer.pos_embed[0], expected)
    save_file(state | {"pos_embed": table[:, :24]}, folder / DINO / "model.safetensors")
    fail_to_load(target, frozen, re.escape("featurizer.pos_embed: found shape (1, 24, 16), expected (1, 4, 16)"))


def test_vision_weights_not_given(frozen, target):
    match = rf"holds no vision_backbone \(frozen in training\).*{DINO}.*at {frozen / 'vision_backbone'}, found nothing"
    fail_to_load(target, frozen, match, FileNotFoundError)


def test_empty_vision_component_counts_as_none(tmp_path, frozen, target, components):
    write_native(frozen, components | {"vision_backbone": {}})
    fail_to_load(target, frozen, "holds no vision_backbone", FileNotFoundError)


def test_vision_weights_given_twice(tmp_path, source, target):
    write_native(tmp_path, native_components(source.state_dict()))
    save_file(our_vision(source), tmp_path / "towers.safetensors")
    match = "holds a vision_backbone of its own: expected no vision weights, found .*towers"
    fail_to_load(target, tmp_path, match, vision_weights=tmp_path / "towers.safetensors")


def test_vision_file_of_another_kind(tmp_path, frozen, source, target):
    file = tmp_path / "towers.safetensors"
    save_file({"blocks.0.norm1.bias": torch.zeros(1)}, file)
    match = r"expected keys vision_backbone\.\*, found \['blocks\.0\.norm1\.bias'\]"
    fail_to_load(target, frozen, match, vision_weights=file)
    file.write_bytes(b"1234567890")
    fail_to_load(target, frozen, "towers.safetensors: truncated, or not a safetensors", vision_weights=file)
    weights = our_vision(source)
    del weights["vision_backbone.fused_featurizer.norm.bias"]
    save_file(weights, file)
    match = r"towers\.safetensors'\]: .*missing \['vision_backbone\.fused_featurizer\.norm\.bias'\]"
    fail_to_load(target, frozen, match, vision_weights=file)


def test_timm_folder_incomplete_or_ambiguous(tmp_path, frozen, source, target):
    folder = tmp_path / "towers"
    timm_files(folder, source)
    siglip = folder / f"{SIGLIP}.webli"
    siglip = siglip.rename(folder / f"{SIGLIP}.v2_webli")  # other weights of the same shape
    match = rf"towers: expected one file {SIGLIP}\.safetensors or .*found \['{DINO}', '{SIGLIP}\.v2_webli'\]"
    fail_to_load(target, frozen, match, FileNotFoundError, vision_weights=folder)
    (siglip / "model.safetensors").rename(folder / f"{SIGLIP}.safetensors")
    load_native_weights(small_model(seed=4), frozen, folder)
    save_file({}, folder / f"{SIGLIP}.webli.safetensors")
    fail_to_load(target, frozen, "expected one file .*found .*webli", FileNotFoundError, vision_weights=folder)


# ---------------------------------------------------------------------------------------------- configuration

NATIVE_CONFIG = {
    "model_id": "prism-qwen25-extra-dinosiglip-224px+0_5b",
    "vision_backbone_id": "dinosiglip-vit-so-224px",
    "llm_backbone_id": "qwen25-0_5b-extra",
    "arch_specifier": "no-align+fused-gelu-mlp",
    "image_resize_strategy": "resize-naive",
    "llm_max_length": 2048,
    "finetune_epochs": 2,
}


@pytest.fixture
def run(tmp_path):
    write_native(tmp_path / "run", {})
    return tmp_path / "run"


def write_config(folder, values):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(values if isinstance(values, str) else json.dumps(values))


def test_config_agrees(run):
    config = build_config("qwen25-0_5b")
    write_config(run, {"model": NATIVE_CONFIG, "stage": "finetune"})
    check_native_config(run, config)
    check_native_config(find_native_checkpoint(run), config)
    write_config(run, {"model": {"vision_backbone_id": "dinosiglip-vit-so-224px"}})
    check_native_config(str(run), config)


@pytest.mark.parametrize("by_file", [True, False])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vision_backbone_id", "dinosiglip-vit-so-384px"),
        ("llm_backbone_id", "qwen25-0_5b-pure"),
        ("arch_specifier", "linear"),
        ("image_resize_strategy", "letterbox"),
    ],
)
def test_config_disagrees(run, field, value, by_file):
    config = build_config("qwen25-0_5b")
    write_config(run, {"model": NATIVE_CONFIG | {field: value}})
    match = re.escape(f"model.{field}: found {value!r}, expected {getattr(config, field)!r}")
    with pytest.raises(ValueError, match=rf"run/config\.json: .*{match}$"):
        check_native_config(find_native_checkpoint(run) if by_file else run, config)


def test_all_disagreements_are_listed(run):
    write_config(run, {"model": NATIVE_CONFIG | {"image_resize_strategy": "letterbox", "arch_specifier": "linear"}})
    found = "model.arch_specifier: found 'linear'.*; model.image_resize_strategy: found 'letterbox',"
    with pytest.raises(ValueError, match=found):
        check_native_config(run, build_config("qwen25-0_5b"))


def test_config_of_a_vla(run, tmp_path):
    """Its fields are compared where present, and those of its base where that is a folder."""
    config, base = build_config("qwen25-0_5b"), tmp_path / "base"
    write_config(run, {"vla": {"base_vlm": "prism-dinosiglip-224px+7b", "action_tokenizer": "extra"}, "seed": 7})
    check_native_config(find_native_checkpoint(run), config)
    write_config(run, {"vla": {"base_vlm": str(base), "image_resize_strategy": "letterbox"}})
    with pytest.raises(ValueError, match=r"run/config\.json: .*vla\.image_resize_strategy: found 'letterbox'"):
        check_native_config(run, config)
    write_config(run, {"vla": {"base_vlm": str(base)}})
    write_config(base, {"model": NATIVE_CONFIG})
    check_native_config(run, config)
    write_config(base, {"model": NATIVE_CONFIG | {"llm_backbone_id": "phi-2-3b"}})
    with pytest.raises(ValueError, match=r"base/config\.json: .*model\.llm_backbone_id: found 'phi-2-3b'"):
        check_native_config(run, config)


def test_config_missing(run, tmp_path):
    config = build_config("qwen25-0_5b")
    check_native_config(find_native_checkpoint(run), config)
    check_native_config(run / "checkpoints" / STEP, config)
    with pytest.raises(FileNotFoundError, match=r"run/config\.json: expected the configuration"):
        check_native_config(run, config)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "step-1.pt").touch()
    check_native_config(bare, config)
    write_config(bare, {"model": NATIVE_CONFIG | {"arch_specifier": "linear"}})
    for path in (bare, bare / "step-1.pt"):
        with pytest.raises(ValueError, match=r"bare/config\.json: .*arch_specifier: found 'linear',"):
            check_native_config(path, config)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "expected JSON"),
        ("[" * 9000, "nested too deeply"),
        ({"model_type": "openvla"}, r"found \['model_type'\]"),
        ("[1]", "found list"),
    ],
)
def test_config_of_another_kind(run, content, match):
    write_config(run, content)
    with pytest.raises(ValueError, match=rf"run/config\.json: .*{match}"):
        check_native_config(run, build_config("qwen25-0_5b"))
