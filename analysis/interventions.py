"""Interventions on a Whisper: what changes when encoder positions may look less far, when what a site gives is another, or when a part of the
encoder's output goes missing.

Each works on any openai-whisper model, on one model object at a time, and leaves it as it was. The experiments are those of the blog post
"Interpreting Whisper" (2023).
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import whisper
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from whisper.audio import log_mel_spectrogram
from whisper.model import AudioEncoder, MultiHeadAttention, Whisper
from whisper.tokenizer import Tokenizer, get_tokenizer

from cache.errors import HearsaeError
from cache.header import FRAME_SECONDS
from cache.plan import SAMPLES_PER_FRAME

DECODE_BATCH = 32
"""Clips decoded at once. Unlike encoding, decoding gains by batching: most of a step is overhead that does not grow with the batch."""


class NextToken(NamedTuple):
    """A candidate for the next position of a transcript."""

    token: int
    text: str
    logit: float
    probability: float


# Attention


class _Band:
    """In place of one attention module's `qkv_attention`: the same, for pairs of positions at most `k` apart."""

    def __init__(self, module: MultiHeadAttention, k: int, near: Tensor) -> None:
        """near: bool [n, n], True where two positions are at most k apart."""
        self.module, self.k, self.near = module, k, near

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        if not MultiHeadAttention.use_sdpa:  # somebody wants the attention weights too
            far = torch.zeros(self.near.shape, device=q.device, dtype=q.dtype).masked_fill(~self.near, -torch.inf)
            return MultiHeadAttention.qkv_attention(self.module, q, k, v, far)
        q, k, v = (x.view(*x.shape[:2], self.module.n_head, -1).transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=self.near).transpose(1, 2).flatten(2), None


@contextmanager
def limit_attention(model: nn.Module, k: int, blocks: Collection[int] | None = None) -> Iterator[None]:
    """While it lasts, every encoder position attends to itself and to at most k positions on either side, in every block, or in `blocks`.

    Exact; the smallest of nested limits holds, and a k that reaches everywhere changes nothing at all. What is outside a position's reach
    in one block can still arrive in a later one: over n blocks information travels n * k positions.

    model: a Whisper, or a module with its `encoder`. Only this object is changed, and it is restored however the context is left.
    Raises HearsaeError for a negative k and a block that is not there.
    """
    if k < 0:
        raise HearsaeError(f"a window of {k} frames is impossible: k must be at least 0")
    encoder: AudioEncoder = model.get_submodule("encoder")
    for number in blocks or ():
        if not 0 <= number < len(encoder.blocks):
            raise HearsaeError(f"there is no encoder block {number}: this model has 0 to {len(encoder.blocks) - 1}")
    modules = [block.attn for number, block in enumerate(encoder.blocks) if blocks is None or number in blocks]
    n = encoder.positional_embedding.shape[0]
    before = [vars(module).get("qkv_attention") for module in modules]
    if k < n - 1:
        position = torch.arange(n, device=encoder.positional_embedding.device)
        near = (position[:, None] - position).abs() <= k
        for module, outer in zip(modules, before, strict=True):
            if not isinstance(outer, _Band) or k < outer.k:
                module.qkv_attention = _Band(module, k, near)
    try:
        yield
    finally:
        for module, outer in zip(modules, before, strict=True):
            vars(module).pop("qkv_attention", None)  # uncovers the method of the class
            if outer is not None:
                module.qkv_attention = outer


# Sites


@contextmanager
def edit_site(model: nn.Module, site: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While it lasts, `change` of what a site gives takes its place in all that is computed from it.

    site: a module's name, as `cache.sites` spells it. change: [batch, positions, width] -> the same shape; it must not write into its argument.
    Edits compose: of several at one site each gets what the one before it made. Only this model object is changed, and it is restored however
    the context is left. Raises HearsaeError for a site that is not there.
    """

    def hook(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    try:
        handle = model.get_submodule(site).register_forward_hook(hook)
    except AttributeError:
        raise HearsaeError(f"this model has no site '{site}'") from None
    try:
        yield
    finally:
        handle.remove()


# Encoder output


@torch.no_grad()
def padding_output(model: Whisper) -> Tensor:
    """The encoder's output for silence alone, which is what Whisper pads with: fp32 [n_audio_ctx, d]."""
    silence = torch.zeros(model.dims.n_audio_ctx * SAMPLES_PER_FRAME)
    return model.encoder(log_mel_spectrogram(silence, n_mels=model.dims.n_mels, device=model.device)[None])[0]


def word_frames(start_s: float, end_s: float, margin: int = 0, n_audio_ctx: int = 1500) -> tuple[int, int]:
    """The frames [start, stop) that a stretch of time touches, and `margin` more on either side, within the window."""
    rounding = 1e-6  # a time that is a frame's boundary touches the frame on one side only
    start = math.floor(start_s / FRAME_SECONDS + rounding) - margin
    stop = math.ceil(end_s / FRAME_SECONDS - rounding) + margin
    return max(0, start), min(n_audio_ctx, stop)


def chop(encoded: Tensor, start: int, stop: int, padding: Tensor) -> Tensor:
    """A copy of an encoder output whose frames [start, stop) are those of padding at the same positions.

    encoded: [..., n_audio_ctx, d]. padding: [n_audio_ctx, d], of `padding_output`. An empty range gives an equal copy.
    Raises HearsaeError for a range that is not within the window.
    """
    if not 0 <= start <= stop <= encoded.shape[-2]:
        raise HearsaeError(f"frames {start}:{stop} can't be chopped: the encoder's output has frames 0:{encoded.shape[-2]}")
    chopped = encoded.clone()
    chopped[..., start:stop, :] = padding[start:stop]
    return chopped


# Decoding


def transcribe_encoded(model: Whisper, encoded: Tensor | Sequence[Tensor], batch: int = DECODE_BATCH, language: str = "en") -> list[str]:
    """The texts that Whisper's own greedy decoder gives for encoder outputs [n, n_audio_ctx, d], in `language`, without timestamps."""
    return [result.text for result in decode_encoded(model, encoded, batch, language)]


def decode_encoded(
    model: Whisper, encoded: Tensor | Sequence[Tensor], batch: int = DECODE_BATCH, language: str = "en"
) -> list[whisper.DecodingResult]:
    """The same with what Whisper says of each text: its mean log probability, the probability that nobody speaks."""
    options = whisper.DecodingOptions(without_timestamps=True, fp16=False, language=language)
    results: list[whisper.DecodingResult] = []
    for first in range(0, len(encoded), batch):
        part = encoded[first : first + batch]
        results += model.decode(part if isinstance(part, Tensor) else torch.stack(list(part)), options)
    return results


@torch.no_grad()
def next_tokens(model: Whisper, prompt: str, n: int = 20, padding: Tensor | None = None) -> list[NextToken]:
    """What the decoder expects after `prompt` when it hears nothing: its n likeliest next tokens, best first.

    prompt: as the tokenizer takes it; words begin with a space (" traffic"). It follows the start-of-transcript sequence (English, without
    timestamps). padding: of `padding_output`, where it is at hand. Probabilities are over the whole vocabulary.
    """
    tokenizer = tokenizer_for(model)
    ids = [*tokenizer.sot_sequence_including_notimestamps, *tokenizer.encode(prompt)]
    heard = padding_output(model) if padding is None else padding
    logits = model.decoder(torch.tensor([ids], device=model.device), heard[None])[0, -1]
    best = logits.topk(n)
    probability = logits.softmax(-1)[best.indices]
    columns = (best.indices.tolist(), best.values.tolist(), probability.tolist())
    return [NextToken(token, tokenizer.decode([token]), logit, p) for token, logit, p in zip(*columns, strict=True)]


def tokenizer_for(model: Whisper, language: str = "en") -> Tokenizer:
    """The tokenizer for transcripts in a language. Raises HearsaeError for one that the model does not know; an English one asks for none."""
    try:
        return get_tokenizer(model.is_multilingual, num_languages=model.num_languages, language=language, task="transcribe")
    except ValueError:
        raise HearsaeError(f"this Whisper does not know the language '{language}': give a code such as en, de, fr") from None
