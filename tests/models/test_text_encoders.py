"""CLIP and T5 encoders against transformers in fp32; every comparison is `close` (the order of sums differs)."""

import pytest
import torch
import transformers
from torch import Tensor, nn

from models.clip import CLIP_BIGG, CLIP_L, CLIPConfig, CLIPText
from models.t5 import T5Config, T5Encoder

VOCABULARY = 120
END = VOCABULARY - 1  # the largest id, as in CLIP

CLIP_L_LIKE = CLIPConfig(vocabulary=VOCABULARY, width=48, layers=3, heads=4, mlp_width=96)
BIGG_LIKE = CLIPConfig(
    vocabulary=VOCABULARY, width=64, layers=4, heads=2, mlp_width=160, activation="gelu", projection=64
)
NARROW = CLIPConfig(
    vocabulary=VOCABULARY, positions=32, width=16, layers=1, heads=1, mlp_width=24, projection=40
)
T5_LIKE = T5Config(vocabulary=VOCABULARY, width=48, layers=3, heads=4, head_width=16, mlp_width=80)
T5_SHORT = T5Config(
    vocabulary=VOCABULARY, width=32, layers=2, heads=2, head_width=8, mlp_width=64, buckets=8, max_distance=20
)


def randomize(module: nn.Module, seed: int) -> nn.Module:
    """Fill every parameter so that no layer, bias or norm is a no-op."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_matrix = parameter.ndim == 2 and "embedding" not in name and "shared" not in name
        parameter.data = noise * parameter.shape[-1] ** -0.5 if is_matrix else 0.5 * noise + ("norm" in name)
    return module.eval().requires_grad_(False)


def shrink_embeddings(module: nn.Module, scale: float) -> nn.Module:
    """With 0.002 the variance that the first norm sees is about as small as its eps, so that another eps gives another text."""
    for name, parameter in module.named_parameters():
        if "embedding" in name or "shared" in name:
            parameter.mul_(scale)
    return module


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|a - b| / |b| in the 2-norm."""
    assert actual.shape == expected.shape
    return ((actual - expected).norm() / expected.norm()).item()


def prompt_ids(batch: int, length: int, pad: int, seed: int) -> Tensor:
    """Random prompts with the end token at a different place in every row."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, END, (batch, length), generator=generator)
    for row in range(batch):
        end = (length - 1) // (row + 1)
        ids[row, end], ids[row, end + 1 :] = END, pad
    return ids


def clip_oracle(config: CLIPConfig) -> nn.Module:
    """The transformers class with the same sizes; eos 2 selects its argmax rule, as in the official configs."""
    theirs = transformers.CLIPTextConfig(
        vocab_size=config.vocabulary,
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        max_position_embeddings=config.positions,
        hidden_act=config.activation,
        projection_dim=config.projection or 1,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )
    if config.projection is None:
        return transformers.CLIPTextModel(theirs)
    return transformers.CLIPTextModelWithProjection(theirs)


@pytest.mark.parametrize("config", [CLIP_L_LIKE, BIGG_LIKE, NARROW])
@pytest.mark.parametrize("scale", [1.0, 0.002])
@pytest.mark.parametrize("batch, length, pad", [(3, 32, END), (2, 32, 0), (2, 9, 0), (1, 2, END)])
@torch.inference_mode()
def test_clip_close_to_transformers(config: CLIPConfig, batch: int, length: int, pad: int, scale: float):
    ours, theirs = shrink_embeddings(randomize(CLIPText(config), seed=0), scale), clip_oracle(config).eval()
    # transformers 5 dropped the prefix `text_model.` in memory, 4 has it (old releases also a buffer, position_ids).
    weights = {name.removeprefix("text_model."): tensor for name, tensor in ours.state_dict().items()}
    names = {name.removeprefix("text_model."): name for name, _ in theirs.named_parameters()}
    assert weights.keys() == names.keys()
    theirs.load_state_dict({names[name]: tensor for name, tensor in weights.items()}, strict=False)

    ids = prompt_ids(batch, length, pad, seed=length)
    penultimate, pooled = ours(ids)
    output = theirs(input_ids=ids, output_hidden_states=True)
    assert relative_error(penultimate, output.hidden_states[-2]) <= 1e-5
    assert (
        relative_error(pooled, output.pooler_output if config.projection is None else output.text_embeds)
        <= 1e-5
    )


@torch.inference_mode()
def test_clip_takes_the_full_77_positions_and_no_more():
    model = randomize(CLIPText(CLIP_L_LIKE), seed=0)
    penultimate, pooled = model(prompt_ids(2, 77, END, seed=0))
    assert penultimate.shape == (2, 77, 48) and pooled.shape == (2, 48)
    with pytest.raises(RuntimeError):
        model(prompt_ids(2, 78, END, seed=0))


@pytest.mark.parametrize("config", [T5_LIKE, T5_SHORT])
@pytest.mark.parametrize("scale", [1.0, 0.002])
@pytest.mark.parametrize("batch, length", [(2, 77), (1, 300), (3, 5), (1, 1)])
@torch.inference_mode()
def test_t5_close_to_transformers(config: T5Config, batch: int, length: int, scale: float):
    ours = shrink_embeddings(randomize(T5Encoder(config), seed=1), scale)
    theirs = transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=config.vocabulary,
            d_model=config.width,
            d_kv=config.head_width,
            d_ff=config.mlp_width,
            num_layers=config.layers,
            num_heads=config.heads,
            relative_attention_num_buckets=config.buckets,
            relative_attention_max_distance=config.max_distance,
            feed_forward_proj="gated-gelu",
        )
    ).eval()
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert (
        set(missing) <= {"encoder.embed_tokens.weight"} and not unexpected
    )  # the same table as shared.weight

    ids = torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length))
    assert relative_error(ours(ids), theirs(input_ids=ids).last_hidden_state) <= 1e-5


@torch.inference_mode()
def test_t5_in_fp16_survives_activations_beyond_the_fp16_range():
    model = randomize(T5Encoder(T5_LIKE), seed=1)
    for block in model.encoder.block:
        block.layer[1].DenseReluDense.wo.weight.mul_(1e5)
    ids = torch.randint(0, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))
    expected = model(ids)
    first = model.encoder.block[0](model.shared(ids), torch.zeros(1, 4, 20, 20))
    assert first.abs().max() > torch.finfo(torch.float16).max
    actual = model.half()(ids)
    assert actual.dtype == torch.float16
    assert relative_error(actual.float(), expected) <= 1e-2


def test_sizes_equal_the_official_files():
    """Tensor and element counts of clip_l, clip_g and t5xxl_fp16 (the last less its second embedding table): equal."""
    with torch.device("meta"):
        models = [CLIPText(CLIP_L), CLIPText(CLIP_BIGG), T5Encoder()]
    counts = [(len(m.state_dict()), sum(t.numel() for t in m.state_dict().values())) for m in models]
    assert counts == [(196, 123_060_480), (517, 694_659_840), (219, 4_762_310_656)]
    assert not any(list(m.buffers()) for m in models)
