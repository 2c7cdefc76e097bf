"""Which tokenizer and which hash the tables of a model belong to: binding, checking, following a new vocabulary size.

The token map is a buffer of the checkpoint, the constants of the hash follow from the config, and the fingerprint in
the config says what both must be. Nothing is looked up before they have been seen to agree.
"""

import copy

import torch

from .ids_hashing import NgramHash, build_token_map, check_fingerprint, layer_constants
from .ids_reach import NO_MEMORY


class TokenizerBinding:
    """Part of `EngramMoEModel`: everything that writes `token_map`, the hash's constants or the fingerprint."""

    vocab_size: int
    token_map: torch.Tensor | None
    hash_multipliers: torch.Tensor
    hash_primes: torch.Tensor

    def init_hash(self) -> None:
        """Register the buffers `token_map`, (vocab_size,) int64, not bound yet, None for a model that needs none, and
        `hash_multipliers` and `hash_primes`, as `hash_layers` takes them."""
        config = self.config
        compresses = bool(config.engram_layer_ids) and config.engram_compressed_vocab_size is not None
        token_map = torch.full((config.vocab_size,), NO_MEMORY, dtype=torch.int64) if compresses else None
        self.register_buffer("token_map", token_map)
        # They follow from the config, so no checkpoint holds them.
        multipliers, primes = layer_constants(config) if config.engram_layer_ids else (None, None)
        self.register_buffer("hash_multipliers", multipliers, persistent=False)
        self.register_buffer("hash_primes", primes, persistent=False)
        # Whether rows are addressed as the config's fingerprint says.
        self.hash_is_confirmed = not config.engram_layer_ids
        self.register_load_state_dict_post_hook(_confirm_after_load)

    def bind_tokenizer(self, tokenizer) -> None:
        """Write the tokenizer's compression into `token_map`, and what follows from it into the config.

        Args:
            tokenizer: a fast tokenizer with at most `config.vocab_size` ids.

        Raises:
            ValueError: the model has no use for a map, another tokenizer is bound already, or the tokenizer does not
                fit the config.
        """
        config = self.config
        if self.token_map is None:
            reason = "has no memory" if not config.engram_layer_ids else "hashes raw token ids (no compression)"
            raise ValueError(f"This model {reason}, so there is no tokenizer to bind; use it as it is.")
        full_map = expand_token_map(tokenizer, config)
        pad_id = int(full_map[config.engram_pad_token_id])
        is_bound = bool((self.token_map >= 0).any())
        size = int(full_map.max()) + 1
        if is_bound and not torch.equal(full_map, self.token_map.cpu()):
            other = copy.copy(config)
            other.engram_compressed_vocab_size = size
            fingerprint = NgramHash.from_config(other, pad_id).fingerprint(full_map)
            check_fingerprint(config.engram_fingerprint, fingerprint, "this tokenizer (another one is bound)")
        if config.engram_compressed_vocab_size not in ("auto", size):
            raise ValueError(
                f"The tokenizer compresses to {size} ids, the config's engram_compressed_vocab_size is "
                f"{config.engram_compressed_vocab_size}. Bind the tokenizer that the model was made for."
            )
        previous_size = config.engram_compressed_vocab_size
        config.engram_compressed_vocab_size = size
        fingerprint = NgramHash.from_config(config, pad_id).fingerprint(full_map)
        if config.engram_fingerprint is not None and config.engram_fingerprint != fingerprint:
            config.engram_compressed_vocab_size = previous_size
            check_fingerprint(config.engram_fingerprint, fingerprint, "this model with this tokenizer")
        self.token_map.copy_(full_map)
        self._write_hash(fingerprint)

    def resize_token_map(self, vocab_size: int) -> None:
        """Follow a change of `vocab_size`: new ids count as padding, and the rows of all others stay where they are."""
        self.vocab_size = vocab_size
        config = self.config
        if self.token_map is None or len(self.token_map) == vocab_size:
            return
        old_size = len(self.token_map)
        pad_id = int(self.token_map[config.engram_pad_token_id])
        token_map = torch.full((vocab_size,), pad_id, dtype=torch.int64, device=self.token_map.device)
        token_map[: min(old_size, vocab_size)] = self.token_map[:vocab_size]
        self.token_map = token_map
        if self.hash_is_confirmed:
            self._write_hash(NgramHash.from_config(config, pad_id).fingerprint(token_map))

    def confirm_hash(self, where: str) -> None:
        """Compare token map and hash constants with the config's fingerprint, or write it where it is now known.

        Args:
            where: what was loaded, for the message.

        Raises:
            ValueError: the fingerprints differ.
        """
        config = self.config
        if not config.engram_layer_ids:
            return
        # Until the end of this: what raises below leaves a model that looks nothing up.
        self.hash_is_confirmed = False
        if self.token_map is None:
            fingerprint = NgramHash.from_config(config).fingerprint(None)
            if config.engram_fingerprint is not None:
                check_fingerprint(config.engram_fingerprint, fingerprint, where)
            return self._write_hash(fingerprint)
        if self.token_map.is_meta:
            return
        if config.engram_compressed_vocab_size == "auto" or not (self.token_map >= 0).any():
            if config.engram_fingerprint is not None or (self.token_map >= 0).any():
                raise ValueError(
                    f"{where}: config and token map do not belong together: the config says "
                    f"engram_compressed_vocab_size={config.engram_compressed_vocab_size!r} and "
                    f"engram_fingerprint={config.engram_fingerprint}, and the token map of the checkpoint is "
                    f"{'bound' if (self.token_map >= 0).any() else 'not bound'}. Load both from one checkpoint."
                )
            return
        pad_id = int(self.token_map[config.engram_pad_token_id])
        fingerprint = NgramHash.from_config(config, pad_id).fingerprint(self.token_map)
        check_fingerprint(config.engram_fingerprint, fingerprint, where)
        self._write_hash(fingerprint)

    def _write_hash(self, fingerprint: dict[str, str]) -> None:
        self.config.engram_fingerprint = fingerprint
        multipliers, primes = layer_constants(self.config)
        self.hash_multipliers.copy_(multipliers)
        self.hash_primes.copy_(primes)
        for table in self.tables():
            table.write_heads()
        self.hash_is_confirmed = True


def expand_token_map(tokenizer, config) -> torch.Tensor:
    """(vocab_size,) int64: the compression of a tokenizer, with the compressed pad for ids that it does not have.

    Raises:
        ValueError: the tokenizer has more ids than the config, or none for padding.
    """
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} ids, the model's vocab_size is {config.vocab_size}. "
            "Build the model with vocab_size of at least len(tokenizer)."
        )
    if config.engram_pad_token_id >= len(tokenizer):
        raise ValueError(
            f"engram_pad_token_id is {config.engram_pad_token_id}, the tokenizer's ids end at {len(tokenizer) - 1}."
        )
    token_map = build_token_map(tokenizer)
    full_map = torch.full((config.vocab_size,), int(token_map[config.engram_pad_token_id]), dtype=torch.int64)
    full_map[: len(token_map)] = token_map
    return full_map


def _confirm_after_load(module, incompatible_keys) -> None:
    module.confirm_hash("the loaded state dict")
