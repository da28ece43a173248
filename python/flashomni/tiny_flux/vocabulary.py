"""Words of the picture language and their encoding: a fixed function, nothing is learned here.

A prompt is at most 16 words. Token i is a concatenation of one-hot vectors: the word itself, the word before
it, the word before that (a window of three, so that "red star" is one thing from the start), and the
position.
The pooled vector counts the words of the prompt (a bag of words).
"""

from __future__ import annotations

import torch

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "pink")
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "diamond", "heart")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
KINDS = SHAPES + DIGITS
SIZES = ("small", "large")
RELATIONS = ("above", "below", "left", "right")  # written "above", "below", "left of", "right of"
PLAIN_BACKGROUNDS = ("white", "black", "gray")
TEXTURES = ("striped", "dotted", "checkered", "wavy")
BACKGROUNDS = PLAIN_BACKGROUNDS + TEXTURES

PAD = "<pad>"
WORDS = (PAD, "a", "on", "background", "and", "of") + RELATIONS + SIZES + COLOURS + KINDS + BACKGROUNDS
WORD_ID = {word: i for i, word in enumerate(WORDS)}
SYNONYMS = {"an": "a", "grey": "gray"}

MAX_WORDS = 16
WORD_SLOTS = 48  # one-hot width of a word: the vocabulary, padded to a multiple of 16
EMBED_DIM = 3 * WORD_SLOTS + MAX_WORDS
POOLED_DIM = WORD_SLOTS
assert len(WORDS) <= WORD_SLOTS


def tokenize(prompt: str) -> list[int]:
    """Word ids of `prompt`, unpadded. Raises ValueError for an unknown word or more than 16 words."""
    words = [SYNONYMS.get(word, word) for word in prompt.lower().replace(",", " ").split()]
    for word in words:
        if word not in WORD_ID or word == PAD:
            known = ", ".join(WORDS[1:] + tuple(SYNONYMS))
            raise ValueError(f"unknown word {word!r} in prompt {prompt!r}; the vocabulary is: {known}")
    if len(words) > MAX_WORDS:
        raise ValueError(f"prompt {prompt!r} has {len(words)} words; at most {MAX_WORDS} are allowed")
    return [WORD_ID[word] for word in words]


def detokenize(ids: list[int]) -> str:
    """The prompt that `ids` spell, without padding and with "an" where English asks for it."""
    words = [WORDS[i] for i in ids if i]
    for i in range(len(words) - 1):
        if words[i] == "a" and words[i + 1] == "orange":
            words[i] = "an"
    return " ".join(words)


def embed_ids(ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Encodes word ids [B, 16] (0 pads) as prompt embeds [B, 16, EMBED_DIM] and pooled embeds [B,
    POOLED_DIM]."""
    one_hot = torch.nn.functional.one_hot(ids, WORD_SLOTS).to(dtype)
    before = torch.nn.functional.pad(one_hot, (0, 0, 1, 0))[:, :-1]
    before_that = torch.nn.functional.pad(one_hot, (0, 0, 2, 0))[:, :-2]
    position = torch.eye(MAX_WORDS, dtype=dtype, device=ids.device).expand(ids.shape[0], -1, -1)
    embeds = torch.cat([one_hot, before, before_that, position], dim=-1)
    pooled = one_hot.sum(1)
    pooled[:, 0] = 0  # padding is not a word of the prompt
    return embeds, pooled


def encode(
    prompts: list[str], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encodes prompts for FluxPipeline: (prompt_embeds [B, 16, EMBED_DIM], pooled_prompt_embeds [B,
    POOLED_DIM]).

    An empty prompt is the unconditional one, the negative prompt of true classifier-free guidance.
    """
    if isinstance(prompts, str):
        prompts = [prompts]
    ids = torch.zeros(len(prompts), MAX_WORDS, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        words = tokenize(prompt)
        ids[row, : len(words)] = torch.tensor(words, dtype=torch.long)
    return embed_ids(ids.to(device), dtype)
