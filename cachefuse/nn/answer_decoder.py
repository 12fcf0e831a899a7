"""A T5 decoder that writes answers token by token, from "Where to fuse", section 2.2; it writes known answers only.

An answer is a path through a tree: the root is the start, and each token leads to a node. At a node the decoder chooses
among the tokens that continue some answer, so the probabilities of all answers add up to 1. Training scores only the
paths of right answers (teacher forcing). Prediction scores all paths: a greedy or a beam search can miss the likeliest
answer. Shapes: C answers, L tokens of the longest answer, N nodes, U distinct tokens, B batch, K answers per row, S
tokens of the memory that the decoder reads (the encoder's output), W width.
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

Answers = Sequence[Sequence[int]]  # the tokens of each answer; the last one is the end token
END = 1  # the end token if words are tokens
AT_ONCE = 1 << 26  # most numbers in memory for tokens that are scored together
MOST = 1 << 28  # most entries in the table of allowed next tokens


@dataclass(frozen=True)
class AnswerTree:
    """The prefix tree of the answers' tokens; tokens are numbered from 1, and 0 is the start.

    For each node: the ``token`` (N,) that leads to it, and the tokens ``allowed`` next (N, 1 + U). For each of the D
    paths, one per distinct answer: its length in ``lengths`` (D,), the ``nodes`` (D, L) where tokens are chosen, and
    these tokens, ``chosen`` (D, L). For each answer: its ``path`` (C,), and the logarithm of its ``share`` (C,) of the
    path's probability, which is below 0 if several answers have the same tokens.
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
        """Build the tree of answers; ``numbers`` numbers their tokens. It is on the CPU, whatever torch's default."""
        node_of: dict[tuple[int, ...], int] = {(): 0}  # prefix of an answer -> node
        copies = Counter(tuple(answer) for answer in answers)
        paths = {answer: i for i, answer in enumerate(copies)}
        longest = max(map(len, answers))
        node_lists, chosen_lists = [], []
        for answer in paths:
            prefixes = [tuple(answer[:i]) for i in range(len(answer))]
            padding = [0] * (longest - len(answer))
            node_lists.append([node_of.setdefault(prefix, len(node_of)) for prefix in prefixes] + padding)
            chosen_lists.append([numbers[token] for token in answer] + padding)
        with torch.device("cpu"):
            nodes, chosen = torch.tensor(node_lists), torch.tensor(chosen_lists)  # (D, L) each
            lengths = torch.tensor(list(map(len, paths)))
            real = torch.arange(longest) < lengths.unsqueeze(1)
            allowed = torch.zeros(len(node_of), 1 + len(numbers), dtype=torch.bool)
            allowed[nodes[real], chosen[real]] = True
            return cls(
                token=torch.tensor([numbers[prefix[-1]] if prefix else 0 for prefix in node_of]),
                allowed=allowed,
                lengths=lengths,
                nodes=nodes,
                chosen=chosen,
                path=torch.tensor([paths[tuple(answer)] for answer in answers]),
                share=-torch.tensor([copies[tuple(answer)] for answer in answers], dtype=torch.float64).log(),
            )

    def to(self, device: torch.device) -> "AnswerTree":
        if self.token.device == device:
            return self
        return replace(self, **{field.name: getattr(self, field.name).to(device) for field in fields(self)})


class AnswerWriter(nn.Module):
    """A T5 decoder that writes known answers: it maps a memory to the log-probability of each answer.

    It embeds and scores only tokens that occur in answers, with one table for both if the settings are ``tied``. Raises
    ConfigError for an answer without tokens, tokens outside the settings' vocabulary (if any), or too many tokens.
    """

    def __init__(self, settings: T5Settings, answers: Answers):
        super().__init__()
        distinct = {token for answer in answers for token in answer}
        most = settings.vocab_size or math.inf
        if not distinct or not all(answers) or not all(type(token) is int and 0 <= token < most for token in distinct):
            raise ConfigError(f"each of the answers must have at least one token, a whole number below {most}")
        tokens = sorted(distinct)
        if sum(map(len, answers)) * (1 + len(tokens)) > MOST:
            raise ConfigError(f"{len(answers):,} answers of {len(tokens):,} tokens are too many; use answers=classes")
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
        max_tokens = AT_ONCE // (len(self.tokens) + 4 * memory.shape[2])
        chunks: list[Tensor] = []  # paths of one length each: no padding
        for n in lengths.unique().tolist():
            chunks += (lengths == n).nonzero().squeeze(1).split(max(1, max_tokens // n))
        order = torch.cat(chunks).argsort()
        rows = max(1, max_tokens // int(lengths.sum()))
        batches = []
        for rows_memory, real in zip(memory.split(rows), mask.split(rows), strict=True):
            prepared = self.decoder.prepare_memory(rows_memory, real)
            scores = [self._score_paths(chunk.expand(len(rows_memory), -1), prepared) for chunk in chunks]
            batches.append(torch.cat(scores, dim=1)[:, order])
        log_p = torch.cat(batches)  # (B, D)
        return log_p[:, tree.path] + tree.share.to(log_p.dtype)

    def learn(self, memory: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
        """Return -sum_c t_c log p_c, averaged over the batch, for targets t (B, C); only answers with t_c > 0 count.

        It equals ``cross_entropy`` of the output of ``forward``, and is much faster with many answers.
        """
        rows, answers = targets.nonzero(as_tuple=True)  # (P,) pairs of a row and a right answer
        keys_values, padding_bias = self.decoder.prepare_memory(memory, mask)
        memories = [(keys[rows], values[rows]) for keys, values in keys_values], padding_bias[rows]
        log_p = self.score(answers.unsqueeze(1), memories).squeeze(1)  # (P,)
        return -(targets[rows, answers] * log_p).sum() / len(targets)

    def score(self, answers: Tensor, memory: Memory) -> Tensor:
        """Return the log-probabilities (B, K) of answers (B, K), given as indices, for each prepared memory."""
        tree = self.tree(answers.device)
        log_p = self._score_paths(tree.path[answers], memory)
        return log_p + tree.share[answers].to(log_p.dtype)

    def _score_paths(self, paths: Tensor, memory: Memory) -> Tensor:
        """Return the log-probabilities (B, K) of paths (B, K), given as indices, for each prepared memory."""
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
        """Return the log-probabilities (..., 1 + U), float32, of the next token, which must be ``allowed``."""
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
        """Copy the weights of a pretrained T5's decoder, with as many layers, and of its tokens."""
        rows = list(self.tokens)
        self.embedding.weight.copy_(t5.embedding.weight[rows])
        self.decoder.load_state_dict(t5.decoder.state_dict())
        if self.lm_head is not None and t5.lm_head is not None:
            self.lm_head.weight.copy_(t5.lm_head.weight[rows])


def words_of(classes: Sequence[str]) -> Answers:
    """Return the answers as tokens, one for each distinct word."""
    words = sorted({word for name in classes for word in name.split()})
    numbers = {word: i for i, word in enumerate(words, start=END + 1)}
    return [[*(numbers[word] for word in name.split()), END] for name in classes]


def pieces_of(classes: Sequence[str], spec: EncoderSpec) -> Answers:
    """Return the answers as tokens of a pretrained T5's tokenizer. Raises EncoderError if it cannot be opened."""
    from cachefuse.encoders.frozen import opening
    from cachefuse.encoders.hf import model_folder, open_tokenizer, quiet

    folder = model_folder(spec)
    with opening(spec), quiet():
        tokenizer = open_tokenizer(folder)
    end = tokenizer.eos_token_id
    return [[*tokenizer(name, add_special_tokens=False)["input_ids"], end] for name in classes]
