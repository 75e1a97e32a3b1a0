"""The tokenizer that a GGUF file's metadata describes, built of the `tokenizers` package's parts.

Byte-level BPE (`gpt2`) keeps its merges and a name for how text is split before them; SentencePiece BPE
(`llama`) keeps its pieces, in the order in which they were learned.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from convert.errors import CheckpointError
from convert.gguf.file import GGUF

_NONE = (None, -1, 2**32 - 1)  # how files say that there is no such token
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # of llama.cpp's types of tokens
_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = [rf"[^\r\n\p{{L}}\p{{N}}]?{words}" for words in (f"{_UPPER}*{_LOWER}+", f"{_UPPER}+{_LOWER}*")]
_GPT2 = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"(?i:{_CONTRACTIONS})|{_WORDS}|\p{{N}}{{1,3}}|{_PUNCTUATION}"
_QWEN2 = rf"(?i:{_CONTRACTIONS})|{_WORDS}|\p{{N}}|{_PUNCTUATION}"
_TEKKEN = "|".join([*_CASED, r"\p{N}", _PUNCTUATION.replace(r"[\r\n]*", r"[\r\n/]*", 1)])
_GPT4O = "|".join(
    [
        *(f"{words}(?i:{_CONTRACTIONS})?" for words in _CASED),
        r"\p{N}{1,3}",
        _PUNCTUATION.replace(r"[\r\n]*", r"[\r\n/]*", 1),
    ]
)
# How text is split, one pattern after the other, by the name that the file gives.
_SPLITS = {
    **dict.fromkeys(("gpt-2", "default", "olmo", "phi-2"), (_GPT2,)),
    **dict.fromkeys(("smollm", "refact", "command-r"), (r"\p{N}", _GPT2)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "smaug-bpe", "dbrx", "falcon3"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), (_QWEN2,)),
    **dict.fromkeys(("gpt-4o", "llama4"), (_GPT4O,)),
    "tekken": (_TEKKEN,),
}
_WHOLE_WORDS = {"llama-bpe", "llama3", "llama-v3", "tekken"}  # a word that is a token needs no merges


def read_tokenizer(gguf: GGUF) -> Any:
    """A `transformers.PreTrainedTokenizerFast` with special tokens and chat template; None without tokens.

    Raises:
        CheckpointError: the file's kind of tokenizer is not known, or its parts do not fit together.
    """
    said = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in gguf.metadata.items()
        if key.startswith("tokenizer.")
    }
    if "tokens" not in said:
        return None
    from transformers import PreTrainedTokenizerFast

    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    kind = said.get("model")
    if kind not in builders:
        raise CheckpointError(
            f"{gguf.file} has a tokenizer of kind {kind!r}, which is not supported: "
            f"choose a file with one of {', '.join(builders)}"
        )
    try:
        tokenizer = builders[kind](gguf, said)
        special = _special_tokens(said)
        _add_tokens(tokenizer, said, special)
    except CheckpointError:
        raise
    except Exception as error:  # tokenizers raises plain Exception
        raise CheckpointError(f"the tokenizer in {gguf.file} cannot be built: {error}") from error
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=said.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _byte_level(gguf: GGUF, said: dict[str, Any]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    name = said.get("pre", "default")
    if name not in _SPLITS:
        raise CheckpointError(
            f"{gguf.file} splits text as {name!r} does (tokenizer.ggml.pre), which is not known: "
            "convert the model's Hugging Face files"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in said["merges"]]
    tokenizer = Tokenizer(models.BPE(_vocabulary(said), merges, ignore_merges=name in _WHOLE_WORDS))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _SPLITS[name]]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(gguf: GGUF, said: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    # Gemma's tokens of spaces are spelled as spaces, all other pieces with SentencePiece's sign.
    said = said | {"tokens": [token if token.strip(" ") else _spaces(token) for token in said["tokens"]]}
    vocabulary = _vocabulary(said)
    types = said.get("token_type", ())
    unknown = next(
        (token for token, kind in zip(said["tokens"], types, strict=False) if kind == _UNKNOWN), None
    )
    model = models.BPE(
        vocabulary,
        _learned_merges(said["tokens"], vocabulary),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    prefix = said.get("add_space_prefix", gguf.architecture != "gemma3")
    begin, strip = ([normalizers.Prepend("▁")], [decoders.Strip(" ", 1, 0)]) if prefix else ([], [])
    tokenizer.normalizer = normalizers.Sequence([*begin, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _spaces(token: str) -> str:
    return token.replace(" ", "▁")


def _vocabulary(said: dict[str, Any]) -> dict[str, int]:
    return {token: index for index, token in enumerate(said["tokens"])}


def _learned_merges(tokens: Sequence[str], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """The pairs that make each piece, in the order in which pieces were learned, which is theirs."""
    return [pair for token in tokens for pair in _pairs(token, vocabulary)]


def _pairs(token: str, vocabulary: dict[str, int]) -> Iterable[tuple[str, str]]:
    cuts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
    known = [pair for pair in cuts if pair[0] in vocabulary and pair[1] in vocabulary]
    return sorted(known, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))


def _special_tokens(said: dict[str, Any]) -> dict[str, str]:
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: said.get(f"{key}_token_id") for name, key in keys.items()}
    tokens = dict(enumerate(said["tokens"]))
    return {name: tokens[index] for name, index in ids.items() if index not in _NONE}


def _add_tokens(tokenizer: Any, said: dict[str, Any], special: dict[str, str]) -> None:
    """Control and user's tokens are matched whole in the text; some stand around every text."""
    from tokenizers import AddedToken, processors

    for wanted, is_special in ((_CONTROL, True), (_USER_DEFINED, False)):
        tokens = [
            AddedToken(token, normalized=False, special=is_special)
            for token, kind in zip(said["tokens"], said.get("token_type", ()), strict=False)
            if kind == wanted
        ]
        (tokenizer.add_special_tokens if is_special else tokenizer.add_tokens)(tokens)
    # llama.cpp begins SentencePiece's texts so unless the file says otherwise.
    begins = said.get("add_bos_token", said["model"] == "llama")
    before = [special["bos_token"]] if begins and "bos_token" in special else []
    after = [special["eos_token"]] if said.get("add_eos_token", False) and "eos_token" in special else []
    if before or after:
        ids = {token: tokenizer.token_to_id(token) for token in (*before, *after)}
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after], special_tokens=list(ids.items())
        )
