"""Answers that a T5 decoder writes token by token, from "Where to fuse", section 2.2; it writes known ones only.

An answer is a path through a tree: its root is the start, and each token leads on to a node. At a node the decoder
chooses among the tokens that lead to some answer, so that the probabilities of all answers add up to 1. To learn, only
the paths of right answers are walked (teacher forcing); to answer, those of all, so that the likeliest answer is
found where a greedy search or a beam may miss it. Shapes: C answers, L tokens of the longest, N nodes, U distinct
tokens, B batch, K answers for each of its rows, S tokens of the memory that the decoder reads (the encoder's output),
W its width.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cachefuse.encoders.base import EncoderSpec
from cachefuse.errors import ConfigError
from cachefuse.nn.t5 import T5, Memory, T5Decoder, T5Settings, linear

Answers = Sequence[Sequence[int]]  # the tokens of each, which end with that of an end
END = 1  # the token of an answer's end, where words are tokens
AT_ONCE = 1 << 26  # numbers that tokens walked side by side take
MOST = 1 << 28  # places in the table of what may follow what


@dataclass(frozen=True)
class AnswerTree:
    """The tree that answers' tokens make, the tokens numbered from 1 on and 0 being the start.

    Of nodes: the ``token`` (N,) that led there, and which tokens are ``allowed`` next (N, 1 + U). Of paths, as many as
    there are distinct answers: their ``lengths`` (D,), the ``nodes`` (D, L) at which their tokens are chosen, and those
    tokens (``chosen``). Of answers: their ``path`` (C,), and the logarithm of the ``share`` (C,) that each has of it:
    below 0 where several are written alike.
    """

    token: Tensor
    allowed: Tensor
    lengths: Tensor
    nodes: Tensor
    chosen: Tensor
    path: Tensor
    share: Tensor

    @classmethod
    def of(cls, answers: Answers, numbers: Mapping[int, int]) -> "AnswerTree":
        """Build the tree of answers whose tokens have these ``numbers``; on the CPU, whatever torch's default is."""
        places: dict[tuple[int, ...], int] = {(): 0}  # of what is written at a node
        alike = Counter(tuple(answer) for answer in answers)
        paths = {answer: i for i, answer in enumerate(alike)}
        length = max(map(len, answers))
        nodes, chosen = [], []
        for answer in paths:
            written = [tuple(answer[:i]) for i in range(len(answer))]
            nodes.append([places.setdefault(prefix, len(places)) for prefix in written] + [0] * (length - len(answer)))
            chosen.append([numbers[token] for token in answer] + [0] * (length - len(answer)))
        with torch.device("cpu"):
            at, taken, lengths = (torch.tensor(found) for found in (nodes, chosen, list(map(len, paths))))
            real = torch.arange(length) < lengths.unsqueeze(1)
            allowed = torch.zeros(len(places), 1 + len(numbers), dtype=torch.bool)
            allowed[at[real], taken[real]] = True
            return cls(
                token=torch.tensor([numbers[prefix[-1]] if prefix else 0 for prefix in places]),
                allowed=allowed,
                lengths=lengths,
                nodes=at,
                chosen=taken,
                path=torch.tensor([paths[tuple(answer)] for answer in answers]),
                share=-torch.tensor([alike[tuple(answer)] for answer in answers], dtype=torch.float64).log(),
            )

    def to(self, device: torch.device) -> "AnswerTree":
        if self.token.device == device:
            return self
        return replace(self, **{field.name: getattr(self, field.name).to(device) for field in fields(self)})


class AnswerWriter(nn.Module):
    """A T5 decoder that writes known answers: from a memory to the logarithm of each one's probability.

    It embeds, and scores, the tokens of answers alone; with the settings' ``tied`` by one table. Raises ConfigError for
    an answer without tokens, tokens that the settings' vocabulary, if there is one, does not have, or too many of them.
    """

    def __init__(self, settings: T5Settings, answers: Answers):
        super().__init__()
        every = {token for answer in answers for token in answer}
        most = settings.vocab_size or math.inf
        if not every or not all(answers) or not all(type(token) is int and 0 <= token < most for token in every):
            raise ConfigError(f"answers must each be of one token or more, whole numbers below {most}")
        tokens = sorted(every)
        if sum(map(len, answers)) * (1 + len(tokens)) > MOST:
            raise ConfigError(f"{len(answers):,} answers of {len(tokens):,} tokens are too many to write; take classes")
        self.settings = settings
        self.tokens = (settings.decoder_start_token_id, *tokens)  # in the order of the table's rows
        self.embedding = nn.Embedding(len(self.tokens), settings.d_model)  # starts at N(0, 1), as T5's
        self.decoder: Any = T5Decoder(settings)
        width = settings.d_model
        self.lm_head = None if settings.tied else linear(width, len(self.tokens), width**-0.5)
        self._tree = AnswerTree.of(answers, {token: i for i, token in enumerate(tokens, start=1)})

    def forward(self, memory: Tensor, mask: Tensor) -> Tensor:
        """Return the log-probabilities (B, C) of all answers, given memories (B, S, W) and masks (B, S)."""
        tree = self.tree(memory.device)
        lengths = tree.lengths
        room = AT_ONCE // (len(self.tokens) + 4 * memory.shape[2])  # for so many tokens
        alike = [(lengths == n).nonzero().squeeze(1).split(max(1, room // n)) for n in lengths.unique().tolist()]
        parts = [part for group in alike for part in group]  # paths of one length each, without any padding
        places = torch.cat(parts).argsort()
        rows = max(1, room // int(lengths.sum()))
        found = []
        for some, real in zip(memory.split(rows), mask.split(rows), strict=True):
            remembered = self.decoder.remember(some, real)
            of_parts = [self._walk(part.expand(len(some), -1), remembered) for part in parts]
            found.append(torch.cat(of_parts, dim=1)[:, places])
        written = torch.cat(found)
        return written[:, tree.path] + tree.share.to(written.dtype)

    def learn(self, memory: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
        """Return -sum_c t_c log p_c, the mean over the batch, for targets t (B, C): only paths of those above 0 count.

        It is ``cross_entropy`` of what ``forward`` returns, in a fraction of its time where there are many answers.
        """
        rows, answers = targets.nonzero(as_tuple=True)  # (P,) pairs of a row and a right answer
        keys_values, shut = self.decoder.remember(memory, mask)
        memories = [(keys[rows], values[rows]) for keys, values in keys_values], shut[rows]
        of_pairs = self.score(answers.unsqueeze(1), memories).squeeze(1)
        return -(targets[rows, answers] * of_pairs).sum() / len(targets)

    def score(self, answers: Tensor, memory: Memory) -> Tensor:
        """Return the log-probabilities (B, K) of K answers (B, K), by their numbers, for each remembered memory."""
        tree = self.tree(answers.device)
        written = self._walk(tree.path[answers], memory)
        return written + tree.share[answers].to(written.dtype)

    def _walk(self, paths: Tensor, memory: Memory) -> Tensor:
        """Return the log-probabilities (B, K) of K paths (B, K), by their numbers, for each remembered memory."""
        tree = self.tree(paths.device)
        paths, shape = paths.flatten(), paths.shape
        lengths = tree.lengths[paths]
        longest = int(lengths.max()) if len(lengths) else 1
        nodes, chosen = tree.nodes[paths, :longest], tree.chosen[paths, :longest]  # (B * K, L)
        hidden = self.decoder(self.embedding(tree.token[nodes]), memory)  # (B * K, L, W)
        steps = self.choices(hidden, tree.allowed[nodes]).gather(2, chosen.unsqueeze(2)).squeeze(2)
        beyond = torch.arange(longest, device=paths.device) >= lengths.unsqueeze(1)
        return steps.masked_fill(beyond, 0).sum(1).view(shape)

    def choices(self, hidden: Tensor, allowed: Tensor) -> Tensor:
        """Return the log-probabilities (..., 1 + U), float32, of the next token, which must be an ``allowed`` one."""
        if self.lm_head is None:
            logits = F.linear(hidden * self.settings.d_model**-0.5, self.embedding.weight)
        else:
            logits = self.lm_head(hidden)
        precise = logits if logits.dtype == torch.float64 else logits.float()
        return precise.masked_fill(~allowed, -torch.inf).log_softmax(-1)

    def tree(self, device: torch.device) -> AnswerTree:
        """Return the tree, on a device."""
        self._tree = self._tree.to(device)
        return self._tree

    @torch.no_grad()
    def load(self, t5: T5) -> None:
        """Take a pretrained T5's decoder, which has as many layers, and its tokens."""
        rows = list(self.tokens)
        self.embedding.weight.copy_(t5.embedding.weight[rows])
        self.decoder.load_state_dict(t5.decoder.state_dict())
        if self.lm_head is not None and t5.lm_head is not None:
            self.lm_head.weight.copy_(t5.lm_head.weight[rows])


def words_of(classes: Sequence[str]) -> Answers:
    """Return answers as tokens of their own: each distinct word is one."""
    words = sorted({word for name in classes for word in name.split()})
    numbers = {word: i for i, word in enumerate(words, start=END + 1)}
    return [[*(numbers[word] for word in name.split()), END] for name in classes]


def pieces_of(classes: Sequence[str], spec: EncoderSpec) -> Answers:
    """Return answers as tokens of a pretrained T5's tokenizer. Raises EncoderError if that can't be opened."""
    from transformers import AutoTokenizer

    from cachefuse.encoders.frozen import opening
    from cachefuse.encoders.hf import model_folder, quiet

    folder = model_folder(spec)
    with opening(spec), quiet():
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    end = tokenizer.eos_token_id
    found = [tokenizer(name, add_special_tokens=False)["input_ids"] for name in classes]
    return [[*pieces, end] for pieces in found]
