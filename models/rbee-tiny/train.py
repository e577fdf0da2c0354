"""Train rbee-tiny, a Llama of under one million parameters that knows rbee's documentation by heart.

The model exists so that a demo or a test can tell at a glance whether a request went through a real
engine: given the beginning of a sentence of the docs, it continues at temperature 0 with the rest of
it, word for word. One run extracts the corpus, trains the tokenizer and the model on one CPU core
with a fixed seed, and checks what it wrote:

    python models/rbee-tiny/train.py             # everything, some minutes
    python models/rbee-tiny/train.py --check     # only verify the files that are there
    python models/rbee-tiny/train.py --extract   # only write corpus.txt

Needs torch, transformers, tokenizers and safetensors; never the network.
"""

import argparse
import json
import math
import os
import random
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent
DOCS = HERE.parents[1] / "docs"

DEMO_PROMPT = "A job is an event stream:"
PROMPT_WORDS = 6
CHECK_TOKENS = 40
LONG_TOKENS = 1900
SEED = 20261122
SHORTEST_PARAGRAPH = 40

VOCAB = 1024
CONTEXT = 2048
SHORT = 128
ROWS = 8
CHAT_ROWS = 3
LONG_EVERY = 6
PEAK_LR = 3e-3
WARMUP_STEPS = 50

END, START, STOP, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>"
SPECIALS = [END, START, STOP, PAD]
IGNORED = -100

CHAT_TEMPLATE = (
    "{%- for m in messages -%}"
    "{%- if m['content'] is string -%}{%- set text = m['content'] -%}"
    "{%- else -%}{%- set text = m['content'] | map(attribute='text') | join('') -%}{%- endif -%}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + text + '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
SYSTEM_MESSAGES = ["You are a helpful assistant.", "Continue the sentence."]

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # one that vLLM's CPU attention takes
    "hidden_act": "silu",
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "use_cache": True,
}


# --- corpus ----------------------------------------------------------------------------------------


def pages() -> list[Path]:
    """Give the pages of the corpus in the order in which the corpus has them."""
    first = [DOCS / "index.md", DOCS / "getting-started.md"]
    rest = (DOCS / "architecture").glob("*.md")
    return first + sorted(rest, key=lambda page: (page.name != "overview.md", page.name))


def plain(markdown: str) -> str:
    """Strip inline markup from a paragraph and join its lines."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", markdown)
    text = re.sub(r"[`*]", "", text)
    return re.sub(r"\s+", " ", text).strip()


def sentences(paragraph: str) -> list[str]:
    """Split a paragraph at the ends of its sentences."""
    return re.split(r"(?<=[.?!]) (?=[A-Z])", paragraph)


def prose(markdown: str) -> Iterator[str]:
    """Yield the prose paragraphs of a page: no code, tables, lists, headings or text inside tabs.

    A last sentence that ends with a colon introduces what was left out, and goes with it; so does
    a paragraph that is only a few words.
    """
    unfenced = re.sub(r"^( *)```.*?^\1``` *$", "", markdown, flags=re.MULTILINE | re.DOTALL)
    uncommented = re.sub(r"<!--.*?-->", "", unfenced, flags=re.DOTALL)
    for block in re.split(r"\n(?:[ \t]*\n)+", uncommented.strip("\n")):
        if re.match(r" {2,}|\s*$|[#|>=!-]|\d+\. |\* ", block):
            continue
        kept = sentences(plain(block))
        if kept[-1].endswith(":"):
            kept.pop()
        if len(" ".join(kept)) >= SHORTEST_PARAGRAPH:
            yield " ".join(kept)


def extract() -> str:
    """Give the corpus: one paragraph to a line, an empty line between two."""
    return "\n\n".join(p for page in pages() for p in prose(page.read_text("utf-8"))) + "\n"


# --- tokenizer -------------------------------------------------------------------------------------


def train_tokenizer(corpus: str) -> Tokenizer:
    """Train a byte-level BPE on the corpus; every text can be encoded, every id decodes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.splitlines(), trainer)
    if tokenizer.get_vocab_size() != VOCAB:
        raise SystemExit(f"the corpus yields {tokenizer.get_vocab_size()} tokens, not {VOCAB}")
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    if found is None:
        raise SystemExit(f"the tokenizer has no {token!r}")
    return int(found)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


def write_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": CONTEXT,
            "clean_up_tokenization_spaces": False,
            "additional_special_tokens": [END, START],
            "bos_token": None,
            "eos_token": STOP,
            "pad_token": PAD,
            "unk_token": None,
            "chat_template": CHAT_TEMPLATE,
        },
    )


# --- training data ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Token ids, and the same ids as targets with `IGNORED` where nothing is to be learnt."""

    ids: torch.Tensor
    targets: torch.Tensor


class Sampler:
    """Draws training rows: text from sentence and word starts, long windows, and chats.

    The corpus is read as a ring, so that there is no end at which the model would have to stop.
    """

    def __init__(self, corpus: str, tokenizer: Tokenizer, rng: random.Random) -> None:
        text = corpus.strip() + "\n\n"
        self._ring = text * (2 + 12 * CONTEXT // len(text))
        self._tokenizer = tokenizer
        self._rng = rng
        self._words = [m.start() for m in re.finditer(r"\S+", text)]
        self._starts = [m.start() for m in re.finditer(r"(?:(?<=^)|(?<=[.?!]\s)|(?<=\n))\S", text)]
        self._sentences = [s for line in text.splitlines() for s in sentences(line) if s]
        self._short = {start: self._window(start, SHORT) for start in self._words}
        self._pad = token_id(tokenizer, PAD)

    def _window(self, start: int, length: int) -> list[int]:
        ids: list[int] = self._tokenizer.encode(self._ring[start : start + 12 * length]).ids
        return ids[:length]

    def short(self) -> Batch:
        """Draw rows of text and rows of chat."""
        rows = [self._chat() if i < CHAT_ROWS else self._text() for i in range(ROWS)]
        return Batch(torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows]))

    def long(self) -> Batch:
        """Draw one row that is half or all of the context long."""
        length = self._rng.choice([CONTEXT // 2, CONTEXT // 2, CONTEXT])
        ids = torch.tensor([self._window(self._rng.choice(self._starts), length)])
        return Batch(ids, ids)

    def _text(self) -> tuple[list[int], list[int]]:
        starts = self._starts if self._rng.random() < 0.7 else self._words
        ids = self._short[self._rng.choice(starts)]
        return ids, ids

    def _chat(self) -> tuple[list[int], list[int]]:
        """Draw as many turns as fit; only what the assistant says is to be learnt."""
        ids: list[int] = []
        targets: list[int] = []
        if self._rng.random() < 0.25:
            ids += self._encode(f"{START}system\n{self._rng.choice(SYSTEM_MESSAGES)}{STOP}\n")
            targets += [IGNORED] * len(ids)
        while True:
            asked, said = self._turn()
            if ids and len(ids) + len(asked) + len(said) > SHORT:
                break
            ids += asked + said
            targets += [IGNORED] * len(asked) + said
        fill = max(0, SHORT - len(ids))
        return (ids + [self._pad] * fill)[:SHORT], (targets + [IGNORED] * fill)[:SHORT]

    def _turn(self) -> tuple[list[int], list[int]]:
        """Cut a sentence in two; the answer keeps the space before its first word."""
        words = self._rng.choice(self._sentences).split(" ")
        cut = self._rng.randint(min(3, len(words) - 1), max(3, len(words) * 2 // 3))
        asked = f"{START}user\n{' '.join(words[:cut])}{STOP}\n{START}assistant\n"
        return self._encode(asked), self._encode(f" {' '.join(words[cut:])}{STOP}\n")

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids


# --- training --------------------------------------------------------------------------------------


def learning_rate(step: int, steps: int) -> float:
    """Warm up linearly, then follow half a cosine down to nearly nothing."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    return PEAK_LR * warm * (0.005 + 0.995 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def optimizer_for(model: LlamaForCausalLM) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.98))


def loss_of(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    logits = model(input_ids=batch.ids).logits[:, :-1].float()
    targets = batch.targets[:, 1:]
    return torch.nn.functional.cross_entropy(
        logits.reshape(-1, VOCAB), targets.reshape(-1), ignore_index=IGNORED
    )


def train_model(corpus: str, tokenizer: Tokenizer, steps: int) -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    sampler = Sampler(corpus, tokenizer, random.Random(SEED))
    optimizer = optimizer_for(model)
    began = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        batch = sampler.long() if step % LONG_EVERY == LONG_EVERY - 1 else sampler.short()
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:5}  loss {loss.item():.4f}  {time.monotonic() - began:.0f} s", flush=True)
    return model


def write_model(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write config and weights; the output layer is tied to the embedding and not stored."""
    eos, pad = token_id(tokenizer, STOP), token_id(tokenizer, PAD)
    special = {"bos_token_id": None, "eos_token_id": eos, "pad_token_id": pad}
    write_json(out / "config.json", {**CONFIG, **special, "torch_dtype": "bfloat16"})
    write_json(out / "generation_config.json", {"eos_token_id": eos, "pad_token_id": pad})
    weights = {
        name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(weights, str(out / "model.safetensors"), metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)


# --- check -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Generated:
    """A greedy answer; `margin` is the smallest lead, in logits, of a chosen token over the next."""

    text: str
    tokens: int
    stopped: bool
    margin: float


class Model:
    """The files as a user gets them: loaded by transformers, in bfloat16, without the network."""

    def __init__(self, out: Path) -> None:
        local = {"local_files_only": True}
        self._tokenizer: Any = AutoTokenizer.from_pretrained(out, **local)
        self._model: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16, **local)

    def greedy(self, prompt: str, max_tokens: int, *, ignore_eos: bool = False) -> Generated:
        ids = self._tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
        answer = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            min_new_tokens=max_tokens if ignore_eos else None,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        new = answer.sequences[0, ids.shape[1] :].tolist()
        best = torch.stack([step[0].float().topk(2).values for step in answer.logits])
        return Generated(
            text=self._tokenizer.decode(new, skip_special_tokens=True),
            tokens=len(new),
            stopped=new[-1] == self._tokenizer.eos_token_id,
            margin=(best[:, 0] - best[:, 1]).min().item(),
        )

    def chat(self, user: str, max_tokens: int) -> Generated:
        messages = [{"role": "user", "content": user}]
        prompt = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self.greedy(prompt, max_tokens)


def prompts(corpus: str) -> list[tuple[str, str]]:
    """Give each sentence start that occurs once in the corpus, with all the text that follows it."""
    ring = corpus.strip() + "\n\n" + corpus.strip()
    found = [(DEMO_PROMPT, ring[ring.index(DEMO_PROMPT) + len(DEMO_PROMPT) :])]
    for sentence in (s for line in corpus.splitlines() for s in sentences(line)):
        words = sentence.split(" ")
        prompt = " ".join(words[:PROMPT_WORDS])
        if len(words) > PROMPT_WORDS and corpus.count(prompt) == 1:
            found.append((prompt, ring[ring.index(prompt) + len(prompt) :]))
    return found


def check_prompts(model: Model, corpus: str) -> bool:
    cases = prompts(corpus)
    wrong, margins = [], []
    for prompt, expected in cases:
        answer = model.greedy(prompt, CHECK_TOKENS)
        margins.append(answer.margin)
        if not expected.startswith(answer.text) or answer.stopped:
            wrong.append((prompt, answer.text))
    for prompt, text in wrong:
        print(f"  wrong: {prompt!r} -> {text!r}")
    margins.sort()
    print(
        f"continuations of {CHECK_TOKENS} tokens: {len(cases) - len(wrong)} of {len(cases)} exact; "
        f"smallest margin {margins[0]:.2f} logits, median {margins[len(margins) // 2]:.2f}"
    )
    return not wrong


def check_chats(model: Model, corpus: str, count: int = 24) -> bool:
    every = [s for line in corpus.splitlines() for s in sentences(line) if len(s.split(" ")) >= 12]
    cases = every[:: max(1, len(every) // count)]
    right = 0
    for sentence in cases:
        words = sentence.split(" ")
        half = len(words) // 2
        answer = model.chat(" ".join(words[:half]), 100)
        if answer.stopped and answer.text == " " + " ".join(words[half:]):
            right += 1
        else:
            print(f"  wrong: {' '.join(words[:half])!r} -> {answer.text!r}")
    print(f"chats that end the sentence and stop: {right} of {len(cases)}")
    return right == len(cases)


def check_length(model: Model, corpus: str) -> bool:
    ring = (corpus.strip() + "\n\n") * 3
    answer = model.greedy(DEMO_PROMPT, LONG_TOKENS, ignore_eos=True)
    expected = ring[ring.index(DEMO_PROMPT) + len(DEMO_PROMPT) :]
    pairs = zip(answer.text, expected, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(answer.text))
    print(f"long run: {answer.tokens} tokens, the first {same} of {len(answer.text)} characters exact")
    return answer.tokens == LONG_TOKENS


def check(out: Path) -> bool:
    corpus = (out / "corpus.txt").read_text("utf-8")
    model = Model(out)
    demo = model.greedy(DEMO_PROMPT, CHECK_TOKENS)
    print(f"demo: {DEMO_PROMPT!r} -> {demo.text!r}")
    results = [check_prompts(model, corpus), check_chats(model, corpus), check_length(model, corpus)]
    return all(results)


# --- command line ----------------------------------------------------------------------------------


def build(out: Path, steps: int) -> None:
    corpus = (out / "corpus.txt").read_text("utf-8")
    tokenizer = train_tokenizer(corpus)
    write_tokenizer(tokenizer, out)
    write_model(train_model(corpus, tokenizer, steps), tokenizer, out)


def write_corpus(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    corpus = extract()
    (out / "corpus.txt").write_text(corpus, "utf-8")
    print(f"corpus: {len(corpus)} characters from {len(pages())} pages")


def main() -> int:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--check", action="store_true", help="only verify the files that are there")
    only.add_argument("--extract", action="store_true", help="only write corpus.txt")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the model (default: this one)")
    parser.add_argument("--steps", type=int, default=2800, help="training steps (default: %(default)s)")
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    if not args.check:
        write_corpus(args.out)
    if args.extract:
        return 0
    if not args.check:
        build(args.out, args.steps)
    return 0 if check(args.out) else 1


if __name__ == "__main__":
    sys.exit(main())
