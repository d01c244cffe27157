"""Text to ids and back, and conversations in the format of the model folder's own chat template.

    tokenizer = Tokenizer("mini")
    tokenizer.chat([{"role": "user", "content": "Hi"}])        # ids of a prompt
    tokenizer.response("<think>...")                           # ids of an answer to it, with its end token
    tokenizer.text(ids)                                        # what a completion says

A template is a program of somebody else's: it runs in jinja2's sandbox, and only its text counts.

Left out: slow tokenizers; tools and images in a conversation.
"""
import json
import re
import signal
import threading
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as BPE

from cli import UserError, read_json, say

# ---- the chat template ---------------------------------------------------------------------------
CHATML = (  # for a folder that has no template of its own, as most base models
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LONGEST_RENDERING = 10  # seconds


class Generation(jinja2.ext.Extension):
    """{% generation %} tells transformers which tokens to train on. What it encloses is rendered as usual."""
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


class ChatTemplate:
    """A template in jinja2's immutable sandbox, with the settings and functions that transformers gives it.

    There is no clock: one that asks for the date gets a fixed one, so a seed gives the same bytes next week.
    Raises UserError, naming the file, for a template that cannot be rendered.
    """

    def __init__(self, source: str, where: str, variables: dict):
        self.where = where
        self.variables = variables
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = self._tojson
        environment.globals["raise_exception"] = self._refuse
        environment.globals["strftime_now"] = self._fixed_date
        with self._named_errors():
            self.compiled = environment.from_string(source)

    def render(self, messages: list[dict], prompt: bool = True) -> str:
        """The text of a conversation; with `prompt`, up to and with the opening of the assistant's turn."""
        given = {"messages": messages, "add_generation_prompt": prompt, "tools": None, "documents": None}
        with self._named_errors():
            return self.compiled.render({**given, **self.variables})

    @contextmanager
    def _named_errors(self):
        try:
            yield
        except Exception as e:  # a template can raise anything
            reason = (str(e).strip() or type(e).__name__).splitlines()[0]
            raise UserError(f"{self.where}: the chat template fails ({reason})") from e

    @staticmethod
    def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    @staticmethod
    def _refuse(message):
        raise jinja2.TemplateError(message)

    @staticmethod
    def _fixed_date(form):
        return datetime(2024, 7, 26).strftime(form)


@contextmanager
def time_limit(seconds: float):
    """Raises TimeoutError inside if it takes longer (where there is such an alarm: not in other threads)."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def ring(number, frame):
        raise TimeoutError(f"it has not ended after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ---- text and ids --------------------------------------------------------------------------------
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
)
THINK = ("<think>", "</think>")  # a model's own: it writes them, so do traces
PRIVATE_USE = range(0xF0000, 0xFFFFE)  # characters without a meaning
# A conversation of words that no template holds, to see what one puts around them.
SYSTEM = {"role": "system", "content": "quince"}
USER = {"role": "user", "content": "medlar"}
ASSISTANT = {"role": "assistant", "content": "damson"}


def is_plain(token: str) -> bool:
    """Whether a token is a word or space, which may stand anywhere."""
    return not token.strip() or token.strip().isalpha()


class Tokenizer:
    """Text to ids and back, and conversations in the format of the folder's own chat template.

    `stop_ids` end a response; `end_id` is the one of them that closes an assistant turn, which SFT teaches.
    `opening` is the "<think>\n" with which the prompts of some models end, so that a response begins inside;
    else "". `template_kwargs` are passed to the template, such as {"enable_thinking": False}.

    *Control tokens* give a conversation its shape, and only the template writes them. In what users and
    models wrote they stay text: <|im_end|> in a question ends no turn.
    """

    def __init__(self, folder: str | Path, template_kwargs: dict | None = None):
        self.folder = Path(folder)
        self.template_kwargs = template_kwargs
        self.files = {}
        for name in TOKENIZER_FILES:
            if (self.folder / name).is_file():
                self.files[name] = (self.folder / name).read_bytes()
        if "tokenizer.json" not in self.files:
            raise UserError(f"{folder}: tokenizer.json is missing; "
                            "--model must be a folder in Hugging Face format with a fast tokenizer")
        source = self._object("tokenizer.json")
        added = {}  # content: token
        for token in source.get("added_tokens") or []:
            if isinstance(token, dict) and isinstance(token.get("content"), str):
                added[token["content"]] = token
        with time_limit(LONGEST_RENDERING):  # a template can loop for ever
            self.template = self._find_template(set(added))
            conversation, closed, prompt = self._render_neutral_words()
        eos = self.template.variables.get("eos_token", "")
        eos_ids = self._eos_ids()
        control = []
        for text, token in added.items():
            ends = token.get("id") in eos_ids or text == eos
            shapes = text in conversation and not is_plain(text)
            # The library's word for control tokens is "special", and not every folder marks them all.
            token["special"] = bool(token.get("special") or ends or shapes) and text not in THINK
            if token["special"]:
                control.append(re.escape(text))
        self.control = "(" + ("|".join(sorted(control, key=len, reverse=True)) or "(?!)") + ")"
        try:
            self.bpe = BPE.from_str(json.dumps(source))
        except Exception as e:  # the tokenizers library raises bare Exception
            reason = str(e).splitlines()[0]
            raise UserError(f"{self.folder}: the tokenizer cannot be read ({reason})") from e
        self.bpe.no_padding()
        self.bpe.no_truncation()
        self.bpe.encode_special_tokens = True  # the library's name for: their text is ordinary text
        self.size = max(self.bpe.get_vocab(with_added_tokens=True).values()) + 1
        self.rows = self.size  # of the embedding; `load` knows better

        found = re.search(self.control, closed)
        self.end_id = self.bpe.token_to_id(found[0] if found else eos)
        if self.end_id is None:
            raise UserError(f"{self.template.where}: no token ends the assistant's turn; the template must "
                            "write one, or tokenizer_config.json name an eos_token")
        self.stop_ids = sorted({self.end_id, *eos_ids, self.bpe.token_to_id(eos)} - {None})
        self.opening = prompt[prompt.rindex("<think>"):] if prompt.rstrip().endswith("<think>") else ""

    # ---- what the folder's files say ----
    def _object(self, name: str) -> dict:
        """The object of a JSON file, {} if there is none."""
        return read_json(self.folder / name) if (self.folder / name).is_file() else {}

    def _find_template(self, added: set[str]) -> ChatTemplate:
        """chat_template.jinja, or tokenizer_config.json's (of several the default one), or else ChatML."""
        config = self._object("tokenizer_config.json")
        where = self.folder / "tokenizer_config.json"
        source = config.get("chat_template")
        if "chat_template.jinja" in self.files:
            where = self.folder / "chat_template.jinja"
            source = self.files["chat_template.jinja"].decode(errors="replace")
        elif isinstance(source, list):
            named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
            if "default" not in named:
                raise UserError(f"{where}: it lists chat templates, but none with the name default")
            source = named["default"]
        if source is None:
            self._take_chatml(config, added)
            source = CHATML
        variables = {}  # {"eos_token": "<|im_end|>", ...}
        for name, value in {**self._object("special_tokens_map.json"), **config}.items():
            text = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(text, str):
                variables[name] = text
        return ChatTemplate(str(source), where, {**variables, **(self.template_kwargs or {})})

    def _take_chatml(self, config: dict, added: set[str]) -> None:
        """Give the folder ChatML, in the files that `save` writes too, or other engines would not know."""
        if not {"<|im_start|>", "<|im_end|>"} <= added:
            raise UserError(f"{self.folder}: it has no chat template, and its tokenizer not the <|im_start|> "
                            "and <|im_end|> of ChatML; put a chat_template.jinja there, such as that of the "
                            "instruct model")
        say(f"{self.folder} has no chat template; it gets ChatML, where <|im_end|> ends a turn")
        config.update(chat_template=CHATML, eos_token="<|im_end|>")
        self.files["tokenizer_config.json"] = json.dumps(config, indent=2).encode()
        if "special_tokens_map.json" in self.files:
            names = {**self._object("special_tokens_map.json"), "eos_token": "<|im_end|>"}
            self.files["special_tokens_map.json"] = json.dumps(names, indent=2).encode()

    def _render_neutral_words(self) -> tuple[str, str, str]:
        """(a conversation, what follows the words of an assistant's turn, a prompt) by the template.

        Raises UserError for one that loses what was said.
        """
        prompt = self.template.render([USER])
        turn = self.template.render([USER, ASSISTANT], prompt=False)
        try:
            conversation = self.template.render([SYSTEM, USER, ASSISTANT, USER])
        except UserError:  # some refuse system turns
            conversation = self.template.render([USER, ASSISTANT, USER])
        if USER["content"] not in prompt or ASSISTANT["content"] not in turn:
            raise UserError(f"{self.template.where}: the chat template renders nothing of what was said")
        return conversation, turn.rpartition(ASSISTANT["content"])[2], prompt

    def _eos_ids(self) -> set[int]:
        """What ends a text by generation_config.json, or without one by config.json."""
        name = "generation_config.json" if "generation_config.json" in self.files else "config.json"
        ids = self._object(name).get("eos_token_id")
        ids = ids if isinstance(ids, list) else [ids]
        if not all(id is None or type(id) is int for id in ids):
            raise UserError(f"{self.folder / name}: eos_token_id must be a number or a list of numbers")
        return set(ids) - {None}

    # ---- ids ----
    def encode(self, text: str) -> list[int]:
        return self._known(self.bpe.encode(text, add_special_tokens=False).ids)

    def _known(self, ids: list[int]) -> list[int]:
        """The ids, all of which the model knows: a tokenizer may have grown without it."""
        largest = max(ids, default=0)
        if largest >= self.rows:
            raise UserError(f"{self.folder}: the embedding has {self.rows} rows and none for the token "
                            f"{self.bpe.id_to_token(largest)!r} ({largest}), which is needed; "
                            "resize the embedding to the tokenizer")
        return ids

    def decode(self, ids: list[int]) -> str:
        return self.bpe.decode(list(ids), skip_special_tokens=False)

    def text(self, ids: list[int]) -> str:
        """The text of a completion, after the `opening` and without the stop token at its end."""
        if ids and ids[-1] in self.stop_ids:
            ids = ids[:-1]
        return self.opening + self.decode(ids)

    def response(self, text: str) -> list[int]:
        """Ids of an assistant's turn as a response to `chat`, with its end token: `text` the other way round.

        Where the prompt has opened <think>, a text that does not begin with it gets an empty thought.
        """
        if self.opening:
            thought = text if text.startswith("<think>") else f"<think>\n\n</think>\n\n{text}"
            text = thought.removeprefix("<think>").removeprefix(self.opening.removeprefix("<think>"))
        return self.encode(text) + [self.end_id]

    def chat(self, messages: list[dict]) -> list[int]:
        """Ids of a conversation, up to and with the opening of the assistant's turn.

        chat([{"role": "user", "content": "Hi"}]) in ChatML:
        <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n

        Equal to transformers' apply_chat_template, except that control tokens in what was said stay text: for
        the rendering a character without a meaning is put after each of their letters, and what can then be
        found in the text are the template's.
        """
        said = "".join(message["content"] for message in messages)
        hidden = next(c for c in map(chr, PRIVATE_USE) if c not in said)

        def hide(match):
            return hidden.join(match[0]) + hidden

        written = []
        for message in messages:
            content = re.sub(self.control, hide, message["content"])
            written.append({"role": message["role"], "content": content})
        text = self.template.render(written)
        if hidden not in text:
            self.bpe.encode_special_tokens = False
            ids = self.bpe.encode(text, add_special_tokens=False).ids
            self.bpe.encode_special_tokens = True
            return self._known(ids)
        ids = []
        for i, piece in enumerate(re.split(f"{self.control}(?!{hidden})", text)):  # text, token, text, ...
            if i % 2:
                ids.append(self.bpe.token_to_id(piece))
            else:
                ids += self.encode(piece.replace(hidden, ""))
        return self._known(ids)
