"""Tokenizers of the two kinds that models have, and chat templates as models write conversations."""

import functools
import json
from typing import Any

from kivi_jax.demo import tasks, tokenizer

TEXTS = [*tasks.SENTENCES, "[INST] [/INST] user assistant system <<SYS>> hello there what is"]
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (  # trims what is said, begins and ends every pair of turns
    "{% set first = messages[0] if messages[0].role == 'system' else none %}"
    "{% for m in (messages[1:] if first else messages) %}"
    "{% if m.role == 'user' %}{{ bos_token }}[INST] "
    "{% if loop.first and first %}<<SYS>>\n{{ first.content }}\n<</SYS>>\n\n{% endif %}"
    "{{ m.content.strip() }} [/INST]"
    "{% else %} {{ m.content.strip() }} {{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}<|im_end|>\n\n{{ m.content.strip() }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<|im_end|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %}{{ m.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant take turns') }}{% endif %}{% endfor %}"
)
FORGETFUL = (  # leaves out the first character of earlier replies, as others do what a model thought
    "{% for m in messages %}<|im_start|>{{ m.content if m.role == 'user' else m.content[1:] }}{% endfor %}"
    "<|im_end|>"
)
TEMPLATES = {
    "chatml": CHATML,
    "llama2": LLAMA2,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "forgetful": FORGETFUL,
}


VOCAB = 896  # of models that can be asked through any of them


@functools.cache
def _spaced() -> Any:
    """As Llama 2's and Mistral's: puts a space before every text, and takes one off what is decoded."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    trained = Tokenizer(models.BPE())
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.normalizer = spaces
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")  # tokens end where words do
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=[*SPECIAL, *alphabet], show_progress=False)
    trained.train_from_iterator(TEXTS, trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    built = Tokenizer(
        models.BPE(vocab=model["vocab"], merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    built.normalizer = spaces
    built.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return built, processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])


@functools.cache
def _bytes() -> Any:
    """The demo's: byte-level, a text is spelled alike wherever it stands."""
    return tokenizer.build()


@functools.cache
def build(kind: str, template: str | None = None) -> Any:
    """A Hugging Face tokenizer, "spaced" or "bytes", with one of `TEMPLATES`."""
    from transformers import PreTrainedTokenizerFast

    if kind == "spaced":
        core, processor = _spaced()
        core.add_special_tokens(SPECIAL)
        core.post_processor = processor
    else:
        core = _bytes()
        core.add_special_tokens(SPECIAL[3:])
    fast = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    fast.chat_template = None if template is None else TEMPLATES[template]
    return fast
