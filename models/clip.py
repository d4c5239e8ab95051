"""CLIP text towers: CLIP-L and OpenCLIP bigG, as SDXL and SD3 use them.

Parameter names equal the official `clip_l.safetensors` and `clip_g.safetensors`. Architecture: Radford et al. 2021,
section 2.4; sizes: Stability-AI/sd3.5 `sd3_infer.py` (CLIPL_CONFIG, CLIPG_CONFIG).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import LongTensor, Tensor, nn


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of a CLIP text tower; the defaults are CLIP-L, `CLIP_BIGG` below is OpenCLIP bigG."""

    vocabulary: int = 49408
    positions: int = 77
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    activation: str = "quick_gelu"  # or "gelu" (exact)
    projection: int | None = None  # width of the projected pooled state, None for no projection
    end: int | None = (
        None  # id of the end token, None for the last of the vocabulary (added tokens follow it)
    )


CLIP_L = CLIPConfig()
CLIP_BIGG = CLIPConfig(width=1280, layers=32, heads=20, mlp_width=5120, activation="gelu", projection=1280)


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI CLIP's approximation of GELU (openai/CLIP `model.py`)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class Attention(nn.Module):
    """Causal multi-head self-attention: position i sees positions 0..i; no padding mask."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, width] -> [B, L, width]."""
        q, k, v = (
            rearrange(project(x), "b l (h d) -> b h l d", h=self.heads)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # [B, heads, L, width / heads]
        return self.out_proj(rearrange(x, "b h l d -> b l (h d)"))


class MLP(nn.Module):
    """Two linear layers with the config's activation between them."""

    def __init__(self, width: int, hidden: int, activation: str):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, width] -> [B, L, width]."""
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.width)
        self.self_attn = Attention(config.width, config.heads)
        self.layer_norm2 = nn.LayerNorm(config.width)
        self.mlp = MLP(config.width, config.mlp_width, config.activation)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, width] -> [B, L, width]."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nn.Module):
    """Token embedding plus learned absolute position embedding."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocabulary, config.width)
        self.position_embedding = nn.Embedding(config.positions, config.width)

    def forward(self, ids: LongTensor) -> Tensor:
        """[B, L] -> [B, L, width]; L may be anything up to `positions`."""
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class Encoder(nn.Module):
    """The list of layers, under the name the files give it."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))


class TextModel(nn.Module):
    """Everything of the tower but the projection; exists for the `text_model.` prefix of the files."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.width)

    def forward(self, ids: LongTensor) -> tuple[Tensor, Tensor]:
        """[B, L] -> input of the last layer [B, L, width], final-normed output of the last layer [B, L, width]."""
        x = self.embeddings(ids)
        *layers, last = self.encoder.layers
        for layer in layers:
            x = layer(x)
        return x, self.final_layer_norm(last(x))


class CLIPText(nn.Module):
    """A CLIP text tower as SDXL and SD3 use it: penultimate hidden state and pooled state.

    SD 1.5 has CLIP-L too, but reads the last state after `final_layer_norm`, which is not returned.
    """

    def __init__(self, config: CLIPConfig = CLIP_L):
        super().__init__()
        self.config = config
        self.end = config.vocabulary - 1 if config.end is None else config.end
        self.text_model = TextModel(config)
        if config.projection is not None:
            self.text_projection = nn.Linear(config.width, config.projection, bias=False)

    def forward(self, ids: LongTensor) -> tuple[Tensor, Tensor]:
        """Token ids [B, L] -> (penultimate state without final norm [B, L, width], pooled [B, projection or width]).

        Pooled is the final-normed state at the first end token. (OpenAI's code takes the largest id, which is the same where
        no tokens were added; transformers takes the first `eos_token_id` of the config.json, or the largest id where that is 2.)
        """
        penultimate, last = self.text_model(ids)
        end = (ids == self.end).int().argmax(dim=1)  # [B]
        pooled = last[torch.arange(len(ids), device=ids.device), end]  # [B, L, width] -> [B, width]
        if self.config.projection is not None:
            pooled = self.text_projection(pooled)
        return penultimate, pooled
