"""Token streams of the corpora, and the order in which training reads them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hybrimoe.demo.training.corpora import Document
from hybrimoe.demo.training.errors import CorpusError

TokenIds = npt.NDArray[np.int32]
"""One stream of token ids, documents framed by the beginning and end tokens."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """What is trained on, and per domain what is not."""

    train: TokenIds
    held_out: dict[str, TokenIds]


def encode_corpus(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, seed: int) -> Corpus:
    """Encodes all documents; the training stream mixes the domains in an order drawn from `seed`."""
    kept = [document for document in documents if not document.held_out]
    order = np.random.default_rng(seed).permutation(len(kept))
    held_out: dict[str, TokenIds] = {}
    for domain in sorted({document.domain for document in documents}):
        held_out[domain] = encode_stream([d.text for d in documents if d.domain == domain and d.held_out], tokenizer)
    return Corpus(train=encode_stream([kept[index].text for index in order], tokenizer), held_out=held_out)


def encode_stream(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> TokenIds:
    """[beginning, text, end] for each text in turn. int32 [tokens]."""
    if not texts:
        return np.empty(0, dtype=np.int32)
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    framed = ([tokenizer.bos_token_id, *encoding.ids, tokenizer.eos_token_id] for encoding in encodings)
    return np.concatenate([np.asarray(ids, dtype=np.int32) for ids in framed])


def token_byte_lengths(tokenizer: PreTrainedTokenizerBase) -> TokenIds:
    """UTF-8 bytes that each id stands for, 0 for special tokens. int32 [vocabulary].

    Byte-level BPE writes each byte as one character, so a token has as many bytes as characters.
    """
    special = set(tokenizer.all_special_ids)
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return np.array([0 if i in special else len(token) for i, token in enumerate(tokens)], dtype=np.int32)


class WindowSampler:
    """Gives the windows of any step without having seen the steps before: the data position is the step number.

    Each epoch shifts the cut marks by a random offset and draws a new order, both from (seed, epoch).
    """

    def __init__(self, stream: TokenIds, seq_len: int, batch_size: int, seed: int) -> None:
        self._stream, self._seq_len, self._batch_size, self._seed = stream, seq_len, batch_size, seed
        self.windows_per_epoch = (len(stream) - seq_len - 1) // seq_len
        if self.windows_per_epoch < 1:
            raise CorpusError(
                f"expected a training stream of more than {2 * seq_len} tokens (two windows), found {len(stream)}"
            )
        self._epoch = -1
        self._starts: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and the tokens that follow them: two int64 [batch, seq_len] tensors."""
        first = step * self._batch_size
        starts = [self._start(first + row) for row in range(self._batch_size)]
        windows = np.stack([self._stream[start : start + self._seq_len + 1] for start in starts]).astype(np.int64)
        return torch.from_numpy(windows[:, :-1].copy()), torch.from_numpy(windows[:, 1:].copy())

    def _start(self, window: int) -> int:
        epoch, position = divmod(window, self.windows_per_epoch)
        if epoch != self._epoch:
            rng = np.random.default_rng([self._seed, epoch])
            offset = rng.integers(self._seq_len)
            self._starts = offset + self._seq_len * rng.permutation(self.windows_per_epoch)
            self._epoch = epoch
        return int(self._starts[position])
