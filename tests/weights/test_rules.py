"""The rules of weights/names.py on tensors with known values; every comparison is `equal`."""

import pytest
import torch
from torch import Tensor

from models.autoencoder import Autoencoder
from models.clip import CLIPText
from models.mmdit import MMDiT
from models.unet import UNet
from weights.names import translate

NETWORKS = {"unet": UNet, "mmdit": MMDiT, "vae": Autoencoder, "clip": CLIPText}


def made(kind: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Module name -> tensor; shapes foretold must be the shapes made."""
    sources, unexpected = translate(NETWORKS[kind], tensors)
    assert not unexpected
    result = {name: source.make([tensors[key] for key in source.keys]) for name, source in sources.items()}
    for name, source in sources.items():
        assert source.shape([tuple(tensors[key].shape) for key in source.keys]) == tuple(result[name].shape)
    return result


def counted(*shape: int, start: int = 0) -> Tensor:
    """0, 1, 2, ... in the given shape."""
    return torch.arange(start, start + torch.Size(shape).numel()).reshape(shape)


def test_query_key_value_are_joined_in_this_order():
    stream = {
        "attn.to_{}": "x_block.attn",
        "attn.add_{}_proj": "context_block.attn",
        "attn2.to_{}": "x_block.attn2",
    }
    for theirs, ours in stream.items():
        names = [f"transformer_blocks.0.{theirs.format(letter)}.weight" for letter in "vqk"]  # in any order
        v, q, k = tensors = [counted(4, 4, start=100 * i) for i in range(3)]
        result = made("mmdit", dict(zip(names, tensors)))
        assert result.keys() == {f"joint_blocks.0.{ours}.qkv.weight"}
        assert torch.equal(result[f"joint_blocks.0.{ours}.qkv.weight"], torch.cat([q, k, v]))


def test_halves_are_swapped_in_four_tensors_only():
    names = [f"transformer_blocks.{i}.{norm}.linear" for i in range(3) for norm in ("norm1", "norm1_context")]
    tensors = {f"{name}.bias": counted(12) for name in names}
    tensors |= {f"{name}.weight": counted(12, 2) for name in names}
    tensors |= {"norm_out.linear.bias": counted(12), "norm_out.linear.weight": counted(12, 2)}
    swapped = {name for name, tensor in made("mmdit", tensors).items() if tensor.flatten()[0] != 0}
    last = ("joint_blocks.2.context_block.adaLN_modulation.1", "final_layer.adaLN_modulation.1")
    assert swapped == {f"{name}.{kind}" for name in last for kind in ("weight", "bias")}
    assert made("mmdit", tensors)["final_layer.adaLN_modulation.1.bias"].tolist() == [
        *range(6, 12),
        *range(6),
    ]


def test_openclip_thirds_and_transposed_projection():
    layer = "transformer.resblocks.7.attn."
    result = made("clip", {layer + "in_proj_weight": counted(6, 2), layer + "in_proj_bias": counted(6),
                           "text_projection": counted(2, 3), "logit_scale": counted(1)})  # fmt: skip
    for i, letter in enumerate("qkv"):
        name = f"text_model.encoder.layers.7.self_attn.{letter}_proj"
        assert torch.equal(result[f"{name}.weight"], counted(6, 2)[2 * i : 2 * i + 2])
        assert torch.equal(result[f"{name}.bias"], counted(6)[2 * i : 2 * i + 2])
    assert torch.equal(result["text_projection.weight"], counted(2, 3).T)
    assert len(result) == 7


def test_openclip_projection_stored_as_a_linear_layer_is_taken_as_it_is():
    """The name alone tells: in bigG both are square. Position ids under either name are of no use."""
    rest = {"transformer.resblocks.0.ln_1.bias": counted(3), "text_model.embeddings.position_ids": counted(1, 77),
            "transformer.text_model.embeddings.position_ids": counted(1, 77)}  # fmt: skip
    for name, expected in (("text_projection.weight", counted(3, 3)), ("text_projection", counted(3, 3).T)):
        result = made("clip", rest | {name: counted(3, 3)})
        assert result.keys() == {"text_model.encoder.layers.0.layer_norm1.bias", "text_projection.weight"}
        assert torch.equal(result["text_projection.weight"], expected)


def test_projection_in_transformers_naming_is_taken_as_it_is():
    tensors = {"text_projection.weight": counted(3, 3), "text_model.final_layer_norm.bias": counted(3)}
    assert torch.equal(made("clip", tensors)["text_projection.weight"], counted(3, 3))
    without_prefix = {"text_projection.weight": counted(3, 3), "final_layer_norm.bias": counted(3)}
    assert made("clip", without_prefix).keys() == tensors.keys()


def test_places_in_the_unet():
    keys = [f"down_blocks.{level}.resnets.{i}.conv1.weight" for level in range(3) for i in range(2)]
    keys += [f"up_blocks.{level}.resnets.{i}.conv1.weight" for level in range(3) for i in range(3)]
    keys += ["up_blocks.1.attentions.0.norm.weight"]
    places = {
        "down_blocks.1.resnets.1.conv1.weight": "input_blocks.5.0.in_layers.2.weight",
        "down_blocks.2.resnets.0.conv1.weight": "input_blocks.7.0.in_layers.2.weight",
        "down_blocks.1.downsamplers.0.conv.bias": "input_blocks.6.0.op.bias",
        "down_blocks.2.attentions.1.norm.weight": "input_blocks.8.1.norm.weight",
        "up_blocks.0.resnets.2.conv1.weight": "output_blocks.2.0.in_layers.2.weight",
        "up_blocks.0.upsamplers.0.conv.bias": "output_blocks.2.1.conv.bias",  # no attention at this level
        "up_blocks.1.upsamplers.0.conv.bias": "output_blocks.5.2.conv.bias",
        "mid_block.resnets.1.conv_shortcut.bias": "middle_block.2.skip_connection.bias",
    }
    sources, unexpected = translate(UNet, {*keys, *places})
    names = {source.keys[0]: name for name, source in sources.items()}
    assert not unexpected and {key: names[key] for key in places} == places


def test_places_in_the_autoencoder():
    tensors = {f"decoder.up_blocks.{i}.resnets.0.conv_shortcut.bias": counted(1, start=i) for i in range(4)}
    tensors |= {"encoder.mid_block.attentions.0.to_out.0.weight": counted(2, 2)}
    result = made("vae", tensors)
    assert [result[f"decoder.up.{i}.block.0.nin_shortcut.bias"].item() for i in range(4)] == [3, 2, 1, 0]
    assert torch.equal(result["encoder.mid.attn_1.proj_out.weight"], counted(2, 2)[:, :, None, None])


@pytest.mark.parametrize("kind, keys, unexpected", [
    ("mmdit", ["transformer_blocks.0.attn.to_q.weight", "transformer_blocks.0.attn.to_q.lora_A"], ["lora_A"]),
    ("unet", ["down_blocks.0.resnets.0.conv1.weight", "down_blocks.0.resnets.0.conv9.weight"], ["conv9"]),
    ("vae", ["decoder.up_blocks.0.resnets.0.conv1.weight", "decoder.mid_block.attentions.0.to_q.bias",
             "decoder.mid_block.attentions.0.query.bias"], ["to_q"]),
    ("clip", ["transformer.resblocks.0.ln_1.bias", "text_projection", "text_projection.weight"], ["text_projection.weight"]),
])  # fmt: skip
def test_what_no_rule_knows_or_two_keys_claim_is_unexpected(
    kind: str, keys: list[str], unexpected: list[str]
):
    _, found = translate(NETWORKS[kind], keys)
    assert len(found) == len(unexpected) and all(word in key for word, key in zip(unexpected, found))


def test_an_incomplete_query_key_value_makes_nothing():
    sources, _ = translate(
        MMDiT, ["transformer_blocks.0.attn.to_q.weight", "transformer_blocks.0.attn.to_k.weight"]
    )
    assert sources == {}


def test_impossible_shapes_have_no_result():
    sources, _ = translate(CLIPText, ["transformer.resblocks.0.attn.in_proj_bias", "text_projection"])
    by_key = {source.keys[0]: source for source in sources.values()}
    assert by_key["transformer.resblocks.0.attn.in_proj_bias"].shape([(7,)]) is None
    assert by_key["text_projection"].shape([(2, 3, 4)]) is None
