"""Train the byte-level BPE tokenizer in torchtitan_liger/assets/tokenizer.

It learns from the `stdlib` dataset, the sources of the Python that runs this script.
The same Python and the same version of `tokenizers` write the same bytes; the files in
the repository are from Python 3.11.7 and tokenizers 0.23.3.

Ids: 0 and 1 are the special tokens below, 2 to 257 the 256 bytes, the rest merges.
"""

import argparse
import json
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torchtitan.hf_datasets.text_datasets import DATASETS

from torchtitan_liger.data import register_datasets

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
SMALLEST_VOCABULARY = 2 + 256
DEFAULT_FOLDER = Path(__file__).parents[1] / "torchtitan_liger" / "assets" / "tokenizer"


def train(vocab_size: int) -> Tokenizer:
    """Train a tokenizer of exactly `vocab_size` tokens, special tokens included.

    Raises:
        ValueError: the vocabulary is too small for the bytes, or too large for the
            corpus.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"--vocab-size {vocab_size} is too small: 2 special tokens and 256 bytes "
            f"take {SMALLEST_VOCABULARY}"
        )
    register_datasets()
    corpus = DATASETS["stdlib"].loader(DATASETS["stdlib"].path)

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        # Every byte, seen in the corpus or not, so that any text can be encoded.
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus["text"], trainer, length=len(corpus))
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"--vocab-size {vocab_size} is too large: the standard library has merges "
            f"for {tokenizer.get_vocab_size()} tokens"
        )
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
    }
    text = json.dumps(config, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train a byte-level BPE tokenizer on Python's standard library.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=DEFAULT_FOLDER,
        help="folder for tokenizer.json and tokenizer_config.json",
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        default=16_384,
        help="number of tokens, special tokens included",
    )
    args = parser.parse_args()
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output: {error}")
    try:
        tokenizer = train(args.vocab_size)
    except ValueError as error:
        parser.error(str(error))
    save(tokenizer, args.output)
    print(f"{tokenizer.get_vocab_size()} tokens written to {args.output}")


if __name__ == "__main__":
    main()
