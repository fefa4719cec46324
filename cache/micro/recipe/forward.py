"""micro's forward pass in training: openai-whisper's own modules, without the cost of full 30 s windows.

Whisper's encoder always sees 1,500 positions; of a short clip all but a few are padding, and nearly alike. Here the encoder sees the T real positions
and K paddings drawn at random from the rest, and every attention adds log((1500 - T) / K) to the logits of those K: each softmax has the mass that
it has in the full window. The decoder's embedding has only the tokens in use.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from whisper.audio import mel_filters
from whisper.model import LayerNorm, ModelDimensions, MultiHeadAttention, ResidualAttentionBlock, Whisper

POSITIONS = 1500
MIDDLE_BLOCK = 2
"""Phones are also asked for after this encoder block: `encoder.blocks.2`."""
UNUSED_LOGIT = -30.0
SILENCE = -1.5
"""Whisper's log-mel of 30 s of silence."""


@dataclass
class Outputs:
    tokens: Tensor
    """Logits [batch, tokens, used]."""
    phones: Tensor
    """Logits of the encoder's output [batch, T, phones]."""
    middle_phones: Tensor
    """The same, after MIDDLE_BLOCK."""
    words: Tensor
    """Logits of the encoder's output [batch, T, words + 1]; 0 is silence."""
    alignment: Tensor
    """log attention of the last decoder block's first cross-attention head [batch, tokens, T + K]."""


class Trainee(nn.Module):
    """A Whisper in training, with the auxiliary heads that are dropped at the end."""

    def __init__(self, dims: ModelDimensions, used: int, phones: int, words: int) -> None:
        super().__init__()
        width = dims.n_audio_state
        self.whisper = Whisper(dims)
        self.whisper.decoder.token_embedding = nn.Embedding(1, width)  # replaced by `embedding` until the export
        self.whisper.decoder.token_embedding.weight.requires_grad_(False)
        self.embedding = nn.Parameter(torch.randn(used, width) * 0.05)
        self.phones, self.middle_phones = nn.Linear(width, phones), nn.Linear(width, phones)
        self.words = nn.Linear(width, words + 1)
        _initialise(self.whisper, width)
        with torch.no_grad():
            self.embedding[:, 0] = 0
        self.hold_unused_logits()

    @torch.no_grad()
    def hold_unused_logits(self) -> None:
        """Keeps the first channel of the decoder's output at 1, so that an embedding [-30, 0, 0, ...] has the logit -30 whatever is said."""
        self.whisper.decoder.ln.weight[0] = 0
        self.whisper.decoder.ln.bias[0] = 1

    def forward(self, mel: Tensor, frames: int, paddings: Tensor, tokens: Tensor, chopped: Tensor | None = None) -> Outputs:
        """mel: [batch, 80, >= 2 * frames + 2], padded; paddings: int64 [K], positions >= frames; tokens: [batch, n], places of used tokens;
        chopped: bool [batch, frames], where the decoder sees what the encoder makes of silence."""
        with torch.autocast(mel.device.type, torch.bfloat16):  # a quarter quicker than fp32 on a CPU with AVX512-BF16
            encoded, middle, bias = self._encode(mel, frames, paddings)
            real = encoded[:, :frames]
            seen = encoded if chopped is None or not chopped.any() else self._chop(encoded, mel, frames, paddings, chopped)
            logits, alignment = self._decode(seen, bias, tokens)
            heads = self.phones(real), self.middle_phones(middle), self.words(real)
        return Outputs(*(part.float() for part in (logits, *heads, alignment)))

    def _chop(self, encoded: Tensor, mel: Tensor, frames: int, paddings: Tensor, chopped: Tensor) -> Tensor:
        silence, _, _ = self._encode(torch.full_like(mel[:1], SILENCE), frames, paddings)
        return torch.where(F.pad(chopped, (0, len(paddings)))[:, :, None], silence, encoded)

    def _encode(self, mel: Tensor, frames: int, paddings: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        encoder, count = self.whisper.encoder, len(paddings)
        x = F.gelu(encoder.conv2(F.gelu(encoder.conv1(mel)))).transpose(1, 2)
        x = torch.cat([x[:, :frames], x[:, frames : frames + 1].expand(-1, count, -1)], 1)
        x = x + torch.cat([encoder.positional_embedding[:frames], encoder.positional_embedding[paddings]])
        bias = torch.zeros(1, 1, 1, frames + count, device=mel.device)
        bias[..., frames:] = math.log((POSITIONS - frames) / count)
        middle = x
        for number, block in enumerate(encoder.blocks):
            x = x + _attention(block.attn, _norm(block.attn_ln, x), bias=bias)
            x = x + block.mlp(_norm(block.mlp_ln, x))
            if number == MIDDLE_BLOCK:
                middle = x[:, :frames]
        return _norm(encoder.ln_post, x), middle, bias

    def _decode(self, encoded: Tensor, bias: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        decoder = self.whisper.decoder
        x = self.embedding[tokens] + decoder.positional_embedding[: tokens.shape[1]]
        query = x
        block: ResidualAttentionBlock
        for block in decoder.blocks:
            x = x + _attention(block.attn, _norm(block.attn_ln, x), is_causal=True)
            query = _norm(block.cross_attn_ln, x)
            x = x + _attention(block.cross_attn, query, encoded, bias)
            x = x + block.mlp(_norm(block.mlp_ln, x))
        return _norm(decoder.ln, x) @ self.embedding.T, _first_head(decoder.blocks[-1].cross_attn, query, encoded, bias)


def _initialise(model: Whisper, width: int) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.7 * width**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    with torch.no_grad():
        for block in [*model.encoder.blocks, *model.decoder.blocks]:
            block.attn.out.weight *= 0.4
            block.mlp[2].weight *= 0.2
            if block.cross_attn is not None:
                block.cross_attn.out.weight *= 0.4
    nn.init.normal_(model.decoder.positional_embedding, std=0.02)


def _attention(module: MultiHeadAttention, x: Tensor, source: Tensor | None = None, bias: Tensor | None = None, is_causal: bool = False) -> Tensor:
    source = x if source is None else source
    query, key, value = (_heads(part, module.n_head) for part in (module.query(x), module.key(source), module.value(source)))
    with torch.autocast(x.device.type, enabled=False):  # on the CPU the fused kernel is quicker in fp32
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, is_causal=is_causal)
    return module.out(mixed.transpose(1, 2).flatten(2))


def _first_head(module: MultiHeadAttention, x: Tensor, source: Tensor, bias: Tensor) -> Tensor:
    query, key = _heads(module.query(x), module.n_head)[:, 0], _heads(module.key(source), module.n_head)[:, 0]
    with torch.autocast(x.device.type, enabled=False):
        return (query @ key.transpose(1, 2) * query.shape[-1] ** -0.5 + bias[:, 0]).log_softmax(-1)


def _heads(x: Tensor, count: int) -> Tensor:
    return x.float().view(*x.shape[:2], count, -1).transpose(1, 2)


def _norm(norm: LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


class LogMel(nn.Module):
    """`whisper.log_mel_spectrogram` of a batch of clips already padded, with another vocal tract and an equaliser on top of it."""

    window: Tensor
    filters: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(400))
        self.register_buffer("filters", mel_filters("cpu", 80).clone())

    @torch.no_grad()
    def forward(self, samples: Tensor, warp: Tensor, equaliser: Tensor) -> Tensor:
        """samples: [batch, n]; warp: [batch], stretches the mel axis, 1 leaves it; equaliser: [batch, 80], added to the log10 energy of
        what is not silent -> [batch, 80, n / 160]."""
        spectrum = torch.stft(samples, 400, 160, window=self.window, return_complex=True)
        mel = (self.filters @ spectrum[..., :-1].abs() ** 2).clamp(min=1e-10).log10()
        mel = _warped(mel, warp)
        mel = torch.where(mel > -9.99, mel + equaliser[:, :, None], mel)
        return (torch.maximum(mel, mel.amax((1, 2), keepdim=True) - 8) + 4) / 4


def _warped(mel: Tensor, warp: Tensor) -> Tensor:
    """Band b of the result is band b * warp of `mel`, linearly interpolated: formants move, pitch's place in time does not."""
    bands = mel.shape[1]
    place = (torch.arange(bands, device=mel.device) * warp[:, None]).clamp(max=bands - 1)
    below = place.floor().long().clamp(max=bands - 2)
    share = (place - below)[:, :, None]
    index = below[:, :, None].expand(-1, -1, mel.shape[2])
    return mel.gather(1, index) * (1 - share) + mel.gather(1, index + 1) * share
