"""What a decoder expects when it hears nothing: its next tokens after a prompt, and how far they are those of a text corpus."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from whisper.model import Whisper

from analysis.experiments.bigrams_report import bigrams_report
from analysis.experiments.bootstrap import ratio_interval
from analysis.experiments.corpus import Bigrams, count_bigrams, lines_of, texts_of
from analysis.experiments.ranks import spearman
from analysis.experiments.report import Report
from analysis.experiments.speech import Mapper, Speech, in_this_process, whole_model
from analysis.experiments.tokens import encode, word_tokens
from analysis.interventions import padding_output, tokenizer_for
from cache.errors import HearsaeError
from cache.location import Location
from cache.model import random_twin

PROMPTS = (" traffic", " New", " Good", " Thank")
"""Of the post, and beginnings that hardly leave a choice. micro's speech has them all."""
TOP = 20
PREFIXES = 50
LEAST = 5
"""Times that a word must have been followed by another: on fewer, its most frequent follower comes by chance."""
FEW = 5
"""The next word is nearly found where it is among so many."""
PROMPTS_AT_ONCE = 32
"""Prompts that a worker is given, and decodes, at once: cross-attention holds keys and values of 1,500 frames for each."""


class Followers(NamedTuple):
    """What follows some words of a corpus."""

    prefixes: list[str]
    tokens: np.ndarray
    """int64 [tokens]: the first tokens of all words that follow any word of the corpus."""
    counts: np.ndarray
    """int64 [prefixes, tokens]: how often each follows each."""
    unigrams: np.ndarray
    """int64 [tokens]: how often each follows any word."""


def bigrams(
    speech: Speech,
    model: str,
    prompts: Sequence[str] = PROMPTS,
    corpus: Location | None = None,
    top: int = TOP,
    prefixes: int = PREFIXES,
    least: int = LEAST,
    seed: int = 0,
    language: str = "en",
    device: str = "auto",
    map_pieces: Mapper = in_this_process,
) -> Report:
    """The decoder's `top` next tokens after each prompt, with the padded, silent input; and its agreement with a corpus' bigrams.

    corpus: a text file, a text a line; default: the texts of `speech`, whose audio is not read. prefixes: so many of the words that are most often
    followed by another are compared, of those where that happens `least` times or more.
    Controls: the same model with random weights, and each prefix held against what the model expects after another one.
    Raises HearsaeError for a model without a decoder, a language or prompt that it can't take, and a corpus without such words.
    """
    loaded = whole_model(model, device, "asking what comes next")
    tokenizer = tokenizer_for(loaded.module, language)
    if min(top, prefixes, least) < 1 or seed < 0:
        raise HearsaeError("--top, --prefixes and --least must be at least 1, and --seed can't be negative")
    start = [*tokenizer.sot_sequence_including_notimestamps]

    def ids(text: str) -> list[int]:
        found = [*start, *encode(tokenizer, text)]
        if len(found) > loaded.dims.n_text_ctx:
            raise HearsaeError(f"the prompt {text[:40]!r} has {len(found) - len(start)} tokens, and {model} takes {loaded.dims.n_text_ctx} in all")
        return found

    asked = [ids(prompt) for prompt in prompts]
    texts: Iterable[str] = texts_of(speech) if corpus is None else lines_of(corpus)
    counted = count_bigrams(texts, partial(encode, tokenizer))
    found = most_followed(counted, prefixes, least)
    asked += [ids(f" {word}") for word in found.prefixes]
    pieces = [asked[first : first + PROMPTS_AT_ONCE] for first in range(0, len(asked), PROMPTS_AT_ONCE)]
    logits = np.concatenate(map_pieces(partial(_logits, model, device), pieces))

    initial = np.union1d(word_tokens(tokenizer).begin, found.tokens)
    of_prefixes = logits[len(prompts) :]
    of_twin = np.concatenate(map_pieces(partial(_logits, random_twin(model), device), pieces))[len(prompts) :]
    others = another(len(found.prefixes), seed)
    by_prefix = compare(of_prefixes, found, initial)
    summary = {
        "prompts": list(prompts),
        "corpus": {"name": str(corpus or speech.dataset), "words": counted.words.total(), "different_words": len(counted.words)},
        "agreement": {"prefixes": len(found.prefixes), **agreement(by_prefix)},
        "unigrams": agreement(compare(np.tile(_log_unigrams(found, logits.shape[1]), (len(found.prefixes), 1)), found, initial)),
        "entropy_of_corpus": float(np.mean([_entropy(row) for row in found.counts])),
        "control": {
            "random_weights": agreement(compare(of_twin, found, initial)),
            "shuffled_prefixes": agreement(compare(of_prefixes[others], found, initial)) if len(others) > 1 else None,
        },
    }
    decode = tokenizer.decode_with_timestamps  # which has a name for each token
    words = [*prompts, *(f" {word}" for word in found.prefixes)]
    rows = [row for number, (text, one) in enumerate(zip(words, logits, strict=True))
            for row in _likeliest("prompt" if number < len(prompts) else "prefix", text, one, top, counted, decode)]  # fmt: skip
    return bigrams_report(rows, _named(found, by_prefix, of_prefixes, initial, decode), summary)


# Corpus


def most_followed(counted: Bigrams, prefixes: int, least: int) -> Followers:
    """Raises HearsaeError where no word is followed by another `least` times."""
    often = sorted(((-followers.total(), word) for word, followers in counted.followers.items() if followers.total() >= least))
    if not often:
        raise HearsaeError(f"no word of the corpus is followed by another {least} times or more: give a larger --corpus, or a smaller --least")
    chosen = [word for _, word in often[:prefixes]]
    tokens = np.array(sorted({token for followers in counted.followers.values() for token in followers}), np.int64)
    column = {int(token): number for number, token in enumerate(tokens)}
    counts, unigrams = np.zeros((len(chosen), len(tokens)), np.int64), np.zeros(len(tokens), np.int64)
    for followers in counted.followers.values():
        for token, n in followers.items():
            unigrams[column[token]] += n
    for row, word in enumerate(chosen):
        for token, n in counted.followers[word].items():
            counts[row, column[token]] = n
    return Followers(chosen, tokens, counts, unigrams)


def another(n: int, seed: int) -> np.ndarray:
    """int64 [n]: for each of n another one, in a random order."""
    order = np.random.Generator(np.random.PCG64(seed)).permutation(n)
    partner = np.empty(n, np.int64)
    partner[order] = np.roll(order, 1)
    return partner


# Model


def _logits(name: str, device: str, prompts: Sequence[Sequence[int]]) -> np.ndarray:
    module = whole_model(name, device).module
    return next_logits(module, prompts, padding_output(module)).cpu().numpy()


@torch.no_grad()
def next_logits(model: Whisper, prompts: Sequence[Sequence[int]], heard: Tensor) -> Tensor:
    """The logits of the token after each prompt, in one go: fp32 [prompts, n_vocab]. `analysis.interventions.next_tokens` takes one at a time.

    prompts: tokens with the start-of-transcript sequence before them. Shorter ones are filled up at the end, which a causal decoder does not see.
    heard: the encoder's output for all of them, [n_audio_ctx, d].
    """
    longest = max(map(len, prompts))
    filled = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in prompts], device=model.device)
    logits = model.decoder(filled, heard.expand(len(prompts), *heard.shape))
    return logits[torch.arange(len(prompts)), torch.tensor([len(ids) - 1 for ids in prompts])].float()


# Comparison


class Compared(NamedTuple):
    """What is expected after a prefix, against what follows it in the corpus."""

    rank: int
    """Of the corpus' most frequent follower (where several are: the best) among all tokens with which a word begins; from 1."""
    spearman: float | None
    """Of expectation and count, over all followers of any word."""
    cross_entropy: float
    """Bits for each follower in the corpus, over the followers of any word."""


def compare(logits: np.ndarray, found: Followers, initial: np.ndarray) -> list[Compared]:
    """logits: [prefixes, n_vocab]. initial: tokens with which a word begins, int64 [n]."""
    compared = []
    for row, counts in zip(logits, found.counts, strict=True):
        of_followers = row[found.tokens].astype(np.float64)
        best = of_followers[counts == counts.max()].max()
        of_followers -= of_followers.max()
        bits = (np.log(np.exp(of_followers).sum()) - of_followers) / np.log(2)
        share = counts / counts.sum()
        compared.append(Compared(1 + int((row[initial] > best).sum()), spearman(of_followers, counts), float(share @ bits)))
    return compared


def agreement(compared: Sequence[Compared]) -> dict[str, Any]:
    """Means over prefixes; 95 % intervals over prefixes."""
    rank, ones = np.array([one.rank for one in compared]), np.ones(len(compared))
    correlations = [one.spearman for one in compared if one.spearman is not None]
    bits = np.array([one.cross_entropy for one in compared])
    return {
        "top1": float(np.mean(rank == 1)), f"top{FEW}": float(np.mean(rank <= FEW)), "median_rank": float(np.median(rank)),
        "spearman": float(np.mean(correlations)) if correlations else None, "cross_entropy": float(bits.mean()),
        "intervals": {"top1": ratio_interval(rank == 1, ones), f"top{FEW}": ratio_interval(rank <= FEW, ones),
                      "cross_entropy": ratio_interval(bits, ones)},
    }  # fmt: skip


def _log_unigrams(found: Followers, n_vocab: int) -> np.ndarray:
    """As logits: what a model would say that knows how often words are, and not what they follow. float64 [n_vocab]"""
    logits = np.full(n_vocab, -np.inf)
    logits[found.tokens] = np.log(found.unigrams / found.unigrams.sum())
    return logits


def _entropy(counts: np.ndarray) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum())


# Rows


def _likeliest(kind: str, text: str, logits: np.ndarray, top: int, counted: Bigrams, decode: Any) -> list[dict[str, Any]]:
    followers = counted.followers.get(text[1:]) if text.startswith(" ") else None
    exact = logits.astype(np.float64)
    probability = np.exp(exact - exact.max())
    probability /= probability.sum()
    best = np.argsort(-exact, kind="stable")[:top]
    return [
        {"kind": kind, "prompt": text, "rank": rank, "token": int(token), "text": decode([int(token)]), "logit": float(logits[token]),
         "probability": float(probability[token]), "corpus_count": followers[int(token)] if followers else None,
         "corpus_probability": followers[int(token)] / followers.total() if followers else None}
        for rank, token in enumerate(best, start=1)
    ]  # fmt: skip


def _named(found: Followers, compared: Sequence[Compared], logits: np.ndarray, initial: np.ndarray, decode: Any) -> list[dict[str, Any]]:
    """The table of prefixes."""
    return [
        {"prefix": word, "followed": int(counts.sum()), "corpus": decode([int(found.tokens[counts.argmax()])]),
         "share": float(counts.max() / counts.sum()), "model": decode([int(initial[row[initial].argmax()])]), "rank": one.rank,
         "spearman": one.spearman, "bits": one.cross_entropy}
        for word, counts, row, one in zip(found.prefixes, found.counts, logits, compared, strict=True)
    ]  # fmt: skip
