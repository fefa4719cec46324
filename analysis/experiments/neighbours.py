"""Words whose token embeddings are alike in the decoder: do they sound alike, or mean alike?"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from analysis.experiments.bootstrap import ratio_interval
from analysis.experiments.corpus import count_bigrams, lines_of, texts_of
from analysis.experiments.neighbours_report import neighbours_report
from analysis.experiments.ranks import correlation, partial_correlation, ranks
from analysis.experiments.report import Report
from analysis.experiments.speech import Speech, whole_model
from analysis.experiments.tokens import encode, word_tokens
from analysis.experiments.word_likeness import company, edit_similarity, pronunciation, read_vectors, same_stem
from analysis.interventions import tokenizer_for
from cache.errors import HearsaeError
from cache.location import Location
from cache.model import random_twin

Pool = Literal["corpus", "vocabulary"]

WORDS = 200
"""Words that are scored: their pairs, 19,900, take a second."""
NEIGHBOURS = 10
SHUFFLES = 200
"""Orders of the labels; of so many, the 2.5th and the 97.5th percentile are told well enough."""
LEAST_WORDS = 10
"""Of which anything is said: of fewer, a rate or a correlation comes by chance."""
SHOWN = 12
SHOWN_LETTERS = 4
"""Of words that are shown unasked: the most frequent words are too short to be told by sound."""


class Vocabulary(NamedTuple):
    """Words that are one token each."""

    words: list[str]
    """As they are written."""
    tokens: np.ndarray
    """int64 [words]"""

    def find(self, words: Sequence[str]) -> np.ndarray:
        """int64: places of words."""
        place = {word: number for number, word in enumerate(self.words)}
        return np.array([place[word] for word in words], np.int64)


class Likeness:
    """How alike words are by everything but their embeddings; similarities from 0 to 1, None where a word has no such thing."""

    def __init__(self, of_company: dict[str, np.ndarray] | None, vectors: dict[str, np.ndarray] | None, is_english: bool) -> None:
        self.of_company, self.vectors, self.is_english = of_company, vectors, is_english
        self._phones: dict[str, tuple[str, ...] | None] = {}

    @cached_property
    def measures(self) -> dict[str, Callable[[str, str], float | None]]:
        known: dict[str, Callable[[str, str], float | None]] = {"spelling": lambda a, b: edit_similarity(a.lower(), b.lower())}
        if self.is_english:
            known = {"sound": self.sound, **known}
        for name, vectors in (("company", self.of_company), ("vectors", self.vectors)):
            if vectors is not None:
                known[name] = partial(_cosine_of, vectors)
        return known

    def sound(self, a: str, b: str) -> float | None:
        for word in (a, b):
            if word not in self._phones:
                self._phones[word] = pronunciation(word)
        of_a, of_b = self._phones[a], self._phones[b]
        return edit_similarity(of_a, of_b) if of_a and of_b else None

    def has(self, name: str, word: str) -> bool:
        return self.measures[name](word, word) is not None


def neighbours(
    speech: Speech,
    model: str,
    show: Sequence[str] = (),
    corpus: Location | None = None,
    vectors: Location | None = None,
    pool: Pool = "corpus",
    words: int = WORDS,
    k: int = NEIGHBOURS,
    seed: int = 0,
    language: str = "en",
    device: str = "auto",
) -> Report:
    """The nearest words, by the cosine of their token embeddings, and how alike these are in sound, spelling and meaning.

    show: words whose neighbours are drawn; default: frequent ones. corpus: a text file; default: the texts of `speech`, whose audio is not read.
    vectors: word vectors of meaning, as `read_vectors` takes them. pool: where neighbours may come from: the corpus' words, or all words of the
    vocabulary. words: so many of the corpus' most frequent are scored.
    Controls: the same tokens of the model with random weights, and the words' sounds, spellings and meanings dealt out anew.
    It is one product of matrices: there is nothing to share out. Raises HearsaeError for a model without a decoder, a word that is not one token,
    a corpus with too few such words, and files that can't be read.
    """
    loaded = whole_model(model, device, "comparing words")
    tokenizer = tokenizer_for(loaded.module, language)
    if min(words, k) < 1 or seed < 0:
        raise HearsaeError("--words and --k must be at least 1, and --seed can't be negative")
    weights = _embeddings(loaded.module)
    own = word_tokens(tokenizer).whole
    own = own[_unique(weights)[own]]
    vocabulary = Vocabulary([tokenizer.decode([int(token)])[1:] for token in own], own)
    known = set(vocabulary.words)
    shown = [word.strip() for word in show]
    for word in shown:
        if word not in known:
            n = len(encode(tokenizer, f" {word}"))
            raise HearsaeError(
                f"the word '{word}' is {f'{n} tokens' if n != 1 else 'a token that is not in use'} to {model}: give words of one token"
            )
    texts = texts_of(speech) if corpus is None else list(lines_of(corpus))
    counted = count_bigrams(texts, lambda text: [0]).words
    frequent = [word for word, _ in sorted(counted.items(), key=lambda one: (-one[1], one[0])) if word in known]
    among = vocabulary if pool == "vocabulary" else _part(vocabulary, [*frequent, *shown])
    scored = list({word.lower(): word for word in reversed(frequent)}.values())[::-1][:words]  # of each spelling the more frequent case
    if len(scored) < LEAST_WORDS:
        raise HearsaeError(f"only {len(scored)} words of the corpus are one token to {model}, and {LEAST_WORDS} are needed: give a larger --corpus")
    shown = shown or [word for word in scored if len(word) >= SHOWN_LETTERS][:SHOWN]
    meaning = None if vectors is None else read_vectors(vectors, among.words)
    likeness = Likeness(company(texts, among.words), meaning, tokenizer.language in (None, "en"))

    twin = _embeddings(whole_model(random_twin(model), device).module)
    pairs = {measure: _between(likeness, measure, scored) for measure in likeness.measures}
    nearest = _nearest(weights, among, scored, likeness, k, seed)
    summary = {
        "corpus": {"name": str(corpus or speech.dataset), "words": counted.total(), "different_words": len(counted)},
        "words": len(scored), "pool": len(among.words), "k": k,
        "correlation": correlations(_cosines(weights, among, scored), pairs, scored, seed),
        "nearest": scores(nearest),
        "control": {
            "random_weights": {"correlation": correlations(_cosines(twin, among, scored), pairs, scored, seed),
                               "nearest": scores(_nearest(twin, among, scored, likeness, k, seed))},
        },
    }  # fmt: skip
    rows = [row for of_word in nearest for row in of_word.rows]
    rows += [row for of_word in _nearest(weights, among, [word for word in shown if word not in scored], likeness, k, seed) for row in of_word.rows]
    return neighbours_report(rows, shown, summary, (pairs.get("sound"), _cosines(weights, among, scored), _cosines(twin, among, scored)))


# Embeddings


def _embeddings(module: Any) -> np.ndarray:
    """Of each token, of length 1: float32 [n_vocab, d]."""
    weight = module.decoder.token_embedding.weight.detach().float()
    return torch.nn.functional.normalize(weight, dim=1).cpu().numpy()


def _unique(weights: np.ndarray) -> np.ndarray:
    """bool [n]: whether no other row is the same. Tokens that are not in use may all have one embedding."""
    digests = [hash(row.tobytes()) for row in weights]
    count = Counter(digests)
    return np.array([count[digest] == 1 for digest in digests])


def _part(vocabulary: Vocabulary, words: Sequence[str]) -> Vocabulary:
    places = np.unique(vocabulary.find(words))
    return Vocabulary([vocabulary.words[place] for place in places], vocabulary.tokens[places])


def _cosines(weights: np.ndarray, among: Vocabulary, words: Sequence[str]) -> np.ndarray:
    """Among words: float32 [words, words]."""
    rows = weights[among.tokens[among.find(words)]]
    return rows @ rows.T


class Nearest(NamedTuple):
    """A word's neighbours and as many other words, and how alike they are to it."""

    rows: list[dict[str, Any]]
    """One for each neighbour, variants in case among them."""
    near: list[dict[str, Any]]
    """The rows of neighbours that are no variants."""
    random: list[dict[str, Any]]
    """Of words drawn from the pool, as many as `near`."""
    variant_first: bool | None
    """Whether the nearest of all is the word in another case; None where the pool has none."""


def _nearest(weights: np.ndarray, among: Vocabulary, words: Sequence[str], likeness: Likeness, k: int, seed: int) -> list[Nearest]:
    folded = np.array([word.lower() for word in among.words])
    every = weights[among.tokens]
    found = []
    for word, at in zip(words, among.find(words), strict=True):
        generator = np.random.Generator(np.random.PCG64([seed, int(among.tokens[at])]))  # a word's draw does not depend on the others
        cosine = every @ every[at]
        order = np.argsort(-cosine, kind="stable")
        order = order[order != at]
        is_variant = folded[order] == word.lower()
        others = order[~is_variant]
        last = int(np.flatnonzero(~is_variant)[:k][-1]) + 1 if len(others) else len(order)

        def row(place: int, rank: int | None, word: str = word, cosine: np.ndarray = cosine) -> dict[str, Any]:
            other = among.words[place]
            alike = {name: measure(word, other) for name, measure in likeness.measures.items()}
            kin = same_stem(word, other) if likeness.is_english else None
            variant = word.lower() == other.lower()
            return {
                "word": word,
                "rank": rank,
                "neighbour": other,
                "cosine": float(cosine[place]),
                "case_variant": variant,
                "same_stem": kin,
                **alike,
            }

        rows = [row(int(place), rank) for rank, place in enumerate(order[:last], start=1)]
        drawn = generator.choice(others, min(k, len(others)), replace=False)
        variant_first = bool(is_variant[0]) if is_variant.any() else None
        found.append(Nearest(rows, [one for one in rows if not one["case_variant"]], [row(int(place), None) for place in drawn], variant_first))
    return found


# Scores


def _between(likeness: Likeness, name: str, words: Sequence[str]) -> np.ndarray:
    """Similarities of words: float64 [words, words], symmetric; nan in the rows of those that have no such thing."""
    table = np.full((len(words), len(words)), np.nan)
    known = [number for number, word in enumerate(words) if likeness.has(name, word)]
    for a in known:
        for b in known:
            if a <= b:
                table[a, b] = table[b, a] = likeness.measures[name](words[a], words[b])
    return table


def correlations(cosines: np.ndarray, pairs: dict[str, np.ndarray], words: Sequence[str], seed: int) -> dict[str, Any]:
    """Spearman's rank correlation of cosine and each similarity over all pairs of words, with the 95 % range of the same under shuffled words.

    Besides, what is left of sound where spelling is the same, and of spelling where sound is (partial rank correlations).
    """
    found: dict[str, Any] = {name: _mantel(cosines, pairs[name], seed) if name in pairs else None for name in dict.fromkeys([*pairs, "company"])}
    if "sound" in pairs:
        known = np.flatnonzero(np.isfinite(np.diag(pairs["sound"])))
        upper = np.triu_indices(len(known), 1)
        by = [ranks(table[np.ix_(known, known)][upper]) for table in (cosines, pairs["sound"], pairs["spelling"])]
        with_sound, with_spelling, of_both = (correlation(by[a], by[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
        if with_sound is not None and with_spelling is not None and of_both is not None:
            found["sound_given_spelling"] = partial_correlation(with_sound, with_spelling, of_both)
            found["spelling_given_sound"] = partial_correlation(with_spelling, with_sound, of_both)
    return found


def _mantel(cosines: np.ndarray, table: np.ndarray, seed: int) -> dict[str, Any] | None:
    """Mantel's test (1967): labels are dealt out anew, so that each pair's similarity becomes another pair's."""
    known = np.flatnonzero(np.isfinite(np.diag(table)))
    if len(known) < LEAST_WORDS:
        return None
    upper = np.triu_indices(len(known), 1)
    by_cosine = ranks(cosines[np.ix_(known, known)][upper])
    ranked = np.zeros((len(known), len(known)))
    ranked[upper] = ranks(table[np.ix_(known, known)][upper])
    ranked += ranked.T
    generator = np.random.Generator(np.random.PCG64(seed))
    shuffled = [correlation(by_cosine, ranked[np.ix_(order, order)][upper]) for order in (generator.permutation(len(known)) for _ in range(SHUFFLES))]
    if None in shuffled:
        return None
    low, high = np.percentile(np.array(shuffled, float), [2.5, 97.5])
    return {"rho": correlation(by_cosine, ranked[upper]), "words": len(known), "pairs": len(by_cosine), "shuffled": [float(low), float(high)]}


def scores(nearest: Sequence[Nearest]) -> dict[str, Any]:
    """Neighbours against words drawn from the pool. Variants in case are counted apart and nowhere else."""
    near, random = ([row for one in nearest for row in getattr(one, of)] for of in ("near", "random"))
    variants = [one.variant_first for one in nearest if one.variant_first is not None]
    names = [name for name in ("sound", "spelling", "company", "vectors") if near and name in near[0]]
    return {
        **{name: {"neighbours": _mean(near, name), "random": _mean(random, name), **_closer(nearest, name, True),
                  "other_stems": _closer(nearest, name, False)["closer"]} for name in names},
        "same_stem": {"neighbours": _mean(near, "same_stem"), "random": _mean(random, "same_stem")},
        "case_variants": {"words": len(variants), "nearest": float(np.mean(variants)) if variants else None},
    }  # fmt: skip


def _closer(nearest: Sequence[Nearest], name: str, same_stems: bool) -> dict[str, Any]:
    """How often a neighbour is more like the word than a drawn word is, ties counting half; all pairs of the two, word by word."""
    parts = []
    for one in nearest:
        near, random = (
            np.array([row[name] for row in rows if row[name] is not None and (same_stems or not row["same_stem"])]) for rows in (one.near, one.random)
        )
        compared = (near[:, None] > random) + 0.5 * (near[:, None] == random)
        if compared.size:
            parts.append(float(compared.mean()))
    if len(parts) < LEAST_WORDS:
        return {"closer": None, "interval": None, "words": len(parts)}
    return {"closer": float(np.mean(parts)), "interval": ratio_interval(np.array(parts), np.ones(len(parts))), "words": len(parts)}


def _mean(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    known = [float(row[name]) for row in rows if row[name] is not None]
    return float(np.mean(known)) if known else None


def _cosine_of(vectors: dict[str, np.ndarray], a: str, b: str) -> float | None:
    of_a, of_b = vectors.get(a.lower()), vectors.get(b.lower())
    return None if of_a is None or of_b is None else float(of_a @ of_b)
