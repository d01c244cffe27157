"""Text to ids and back, and conversations in the format of the model folder's own chat template.

    tokenizer = Tokenizer("mini")
    tokenizer.chat([{"role": "user", "content": "Hi"}])        # ids of a prompt
    tokenizer.encode_response("<think>...")                    # ids of an answer to it, with its end token
    tokenizer.decode_response(ids)                             # what a completion says

A template is a program of somebody else's: it runs in jinja2's sandbox, and only its text counts.

Left out: slow tokenizers; tools and images in a conversation.
"""
import json
import re
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path

import jinja2.ext
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as BPE

from run.command import UserError
from run.files import read_json

# ---- the chat template ---------------------------------------------------------------------------
CHATML = (  # for a folder that has no template of its own, as most base models
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Generation(jinja2.ext.Extension):
    """{% generation %} tells transformers which tokens to train on. What it encloses is rendered as usual."""
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


class ChatTemplate:
    """A template in jinja2's immutable sandbox, with the settings and functions that transformers gives it.

    Nothing in it is random and it has no clock: a template that asks for the date gets a fixed one, so that a
    seed gives the same bytes next week. Raises UserError, naming the file, for one that cannot be rendered.
    """

    def __init__(self, source: str, where: Path, variables: dict):
        self.where = where
        self.variables = variables
        self.names = set()  # of the variables that it looks at
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        environment.globals["raise_exception"] = self._refuse
        environment.globals["strftime_now"] = self._fixed_date
        del environment.globals["lipsum"], environment.filters["random"]
        with self._named_errors():
            self.names = jinja2.meta.find_undeclared_variables(environment.parse(source))
            self.compiled = environment.from_string(source)

    def render(self, messages: list[dict], prompt: bool = True) -> str:
        """The text of a conversation; with `prompt`, up to and with the opening of the assistant's turn."""
        given = {"messages": messages, "add_generation_prompt": prompt, "tools": None, "documents": None}
        with self._named_errors():
            return self.compiled.render({**self.variables, **given})

    @contextmanager
    def _named_errors(self):
        try:
            yield
        except Exception as e:  # a template can raise anything
            reason = (str(e).strip() or type(e).__name__).splitlines()[0]
            raise UserError(f"{self.where}: the chat template fails ({reason})") from e

    @staticmethod
    def _refuse(message):
        raise jinja2.TemplateError(message)

    @staticmethod
    def _fixed_date(form):
        return datetime(2024, 7, 26).strftime(form)


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


def added_tokens(source: dict) -> dict[str, dict]:
    """{text: token} of the tokens that are matched as a whole, from the content of tokenizer.json."""
    tokens = source.get("added_tokens")
    added = {}
    for token in tokens if isinstance(tokens, list) else []:  # the library will report what is damaged
        if isinstance(token, dict) and isinstance(token.get("content"), str):
            added[token["content"]] = token
    return added


def mark_control_tokens(added: dict[str, dict], ends: set[str], rendered: str) -> str:
    """Marks as special the control tokens in `added` and no others. Returns a pattern of them.

    They are those that the folder marks special (it may not mark all), those that end a text, and those that
    the template writes around neutral words, except plain letters or space, which may occur anywhere.
    """
    control = []
    for text, token in added.items():
        plain = not text.strip() or text.strip().isalpha()
        special = bool(token.get("special")) or text in ends or (text in rendered and not plain)
        token["special"] = special and text not in THINK
        if token["special"]:
            control.append(text)
            token["normalized"] = False  # or <|IM_END|> would be one where a tokenizer lowers letters
    longest_first = sorted(control, key=len, reverse=True)
    return "(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")"


class Tokenizer:
    """The tokenizer of a folder. `rows`: of the model's embedding, which may be fewer than there are ids.

    `stop_ids` end a response; `end_id` is the one of them that closes an assistant turn, which SFT teaches.
    `opening` is the "<think>\n" with which the prompts of some models end, so that a response begins inside;
    else "". `template_kwargs` are passed to the template, such as {"enable_thinking": False}.

    *Control tokens* give a conversation its shape, and only the template writes them. In what users and
    models wrote they stay text: <|im_end|> in a question ends no turn.
    """

    def __init__(self, folder: str | Path, template_kwargs: dict | None = None, rows: int | None = None):
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
        added = added_tokens(source)
        self.template = self._find_template(added.keys())
        rendered, closed, prompt = self._render_neutral_words()
        eos = self._named_tokens().get("eos_token", "")
        eos_ids = self._eos_ids()
        ends = {text for text, token in added.items() if token.get("id") in eos_ids} | {eos}
        self.control = mark_control_tokens(added, ends, rendered)
        try:
            self.bpe = BPE.from_str(json.dumps(source))
        except Exception as e:  # the tokenizers library raises bare Exception
            reason = str(e).splitlines()[0]
            raise UserError(f"{self.folder}: the tokenizer cannot be read ({reason})") from e
        self._check_added_elsewhere()
        self.bpe.no_padding()
        self.bpe.no_truncation()
        self.bpe.encode_special_tokens = True  # as ordinary text, that is
        self.size = max(self.bpe.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.rows = rows or self.size

        match = re.search(self.control, closed)
        self.end_id = self.bpe.token_to_id(match[0] if match else eos)
        if self.end_id is None:
            raise UserError(f"{self.template.where}: no token ends the assistant's turn; the template must "
                            "write one, or tokenizer_config.json name an eos_token")
        self.stop_ids = sorted({self.end_id, *eos_ids, self.bpe.token_to_id(eos)} - {None})
        self.opening = prompt[prompt.rindex("<think>"):] if prompt.rstrip().endswith("<think>") else ""

    # ---- what the folder's files say ----
    def _object(self, name: str) -> dict:
        """What a JSON file holds, {} if there is none."""
        return read_json(self.folder / name, self.files.get(name, b"{}"))

    def _check_added_elsewhere(self) -> None:
        """transformers adds the tokens of two other files to those of tokenizer.json: we want them there."""
        decoder = self._object("tokenizer_config.json").get("added_tokens_decoder")
        texts = list(self._object("added_tokens.json"))
        for entry in decoder.values() if isinstance(decoder, dict) else []:
            texts.append(str(entry.get("content")) if isinstance(entry, dict) else str(entry))
        for text in texts:
            if self.bpe.token_to_id(text) is None:
                raise UserError(f"{self.folder}: tokenizer.json lacks the token {text!r}, which another file "
                                "adds; load the tokenizer with transformers and save it again")

    def _named_tokens(self) -> dict[str, str]:
        """{"eos_token": "<|im_end|>", ...}, from the same of two files as in transformers."""
        config = self._object("tokenizer_config.json")
        if "added_tokens_decoder" not in config:
            config = {**config, **self._object("special_tokens_map.json")}
        tokens = {}
        for name, value in config.items():
            text = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(text, str):
                tokens[name] = text
        return tokens

    def _find_template(self, added: set[str]) -> ChatTemplate:
        """chat_template.jinja, or tokenizer_config.json's (of several the default one), or else ChatML."""
        config = self._object("tokenizer_config.json")
        where = self.folder / "tokenizer_config.json"
        source = config.get("chat_template")
        if "chat_template.jinja" in self.files:
            where = self.folder / "chat_template.jinja"
            source = self.files["chat_template.jinja"].decode(errors="replace")
        elif isinstance(source, list):
            source = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        if isinstance(source, dict):
            source = source.get("default", False)
        self.has_template = source is not None
        if not self.has_template:
            self._take_chatml(config, added)
            source = CHATML
        if not isinstance(source, str):
            raise UserError(f"{where}: chat_template must be a text, or several of which one has the name "
                            "default")
        return ChatTemplate(source, where, {**self._named_tokens(), **(self.template_kwargs or {})})

    def _take_chatml(self, config: dict, added: set[str]) -> None:
        """Give the folder ChatML, in the files that `save` writes too, or other engines would not know."""
        if not {"<|im_start|>", "<|im_end|>"} <= added:
            raise UserError(f"{self.folder}: it has no chat template, and its tokenizer lacks "
                            "ChatML's <|im_start|> and <|im_end|>; put a chat_template.jinja there, such as "
                            "the instruct model's")
        config.update(chat_template=CHATML, eos_token="<|im_end|>")
        self.files["tokenizer_config.json"] = json.dumps(config, indent=2).encode()
        if "special_tokens_map.json" in self.files:
            names = {**self._object("special_tokens_map.json"), "eos_token": "<|im_end|>"}
            self.files["special_tokens_map.json"] = json.dumps(names, indent=2).encode()

    def _render_neutral_words(self) -> tuple[str, str, str]:
        """(conversations, what follows the words of an assistant's turn, a prompt) by the template.

        Raises UserError for one that loses what was said.
        """
        prompt = self.template.render([USER])
        turn = self._rendered_or_nothing([USER, ASSISTANT], prompt=False)
        if USER["content"] not in prompt or (turn and ASSISTANT["content"] not in turn):
            raise UserError(f"{self.template.where}: the chat template renders nothing of what was said")
        rendered = prompt + turn + self._rendered_or_nothing([USER, ASSISTANT, USER])
        rendered += self._rendered_or_nothing([SYSTEM, USER])
        return rendered, turn.rpartition(ASSISTANT["content"])[2], prompt

    def _rendered_or_nothing(self, messages: list[dict], prompt: bool = True) -> str:
        """Some templates refuse system turns, some a conversation that ends with the assistant."""
        try:
            return self.template.render(messages, prompt)
        except UserError:
            return ""

    def _eos_ids(self) -> list[int]:
        """What ends a text by generation_config.json, or without one by config.json."""
        name = "generation_config.json"
        ids = self._object(name).get("eos_token_id")
        if name not in self.files and (self.folder / "config.json").is_file():
            name = "config.json"
            ids = read_json(self.folder / name).get("eos_token_id")
        ids = ids if isinstance(ids, list) else [ids]
        if not all(id is None or type(id) is int for id in ids):
            raise UserError(f"{self.folder / name}: eos_token_id must be a number or a list of numbers")
        return [id for id in ids if id is not None]

    # ---- ids ----
    def encode(self, text: str) -> list[int]:
        try:
            ids = self.bpe.encode(text, add_special_tokens=False).ids
        except TypeError as e:  # half of a surrogate pair: what a terminal makes of other encodings
            raise UserError(f"the text {text[:60]!r} is not valid Unicode; fix it") from e
        return self._known(ids)

    def _known(self, ids: list[int]) -> list[int]:
        """The same ids. Raises UserError for one without an embedding, if the tokenizer alone has grown."""
        largest = max(ids, default=0)
        if largest >= self.rows:
            raise UserError(f"{self.folder}: the embedding has {self.rows} rows and none for the token "
                            f"{self.bpe.id_to_token(largest)!r} ({largest}), which is needed; "
                            "resize the embedding to the tokenizer")
        return ids

    def decode(self, ids: list[int]) -> str:
        return self.bpe.decode(list(ids), skip_special_tokens=False)

    def decode_response(self, ids: list[int]) -> str:
        """The text of a completion: the prompt's `opening`, then what was sampled, without the stop token."""
        if ids and ids[-1] in self.stop_ids:
            ids = ids[:-1]
        return self.opening + self.decode(ids)

    def after_own_thought(self, ids: list[int]) -> str:
        """The text of an attempt: where the prompt opened <think>, what follows the first </think>."""
        text = self.decode_response(ids)
        return (text.partition("</think>")[2].lstrip() if self.opening else "") or text

    def encode_response(self, text: str) -> list[int]:
        """The inverse of `decode_response`: ids, with the end token, of an answer to `chat`'s prompt.

        Where the prompt has opened <think>, a text without a thought gets an empty one.
        """
        if self.opening and text.lstrip().startswith("<think>"):
            opened = self.opening.removeprefix("<think>")
            text = text.lstrip().removeprefix("<think>").removeprefix(opened)
        elif self.opening and "</think>" not in text:
            text = f"\n</think>\n\n{text}"
        return self.encode(text) + self._known([self.end_id])

    def chat(self, messages: list[dict]) -> list[int]:
        """Ids of a conversation, up to and with the opening of the assistant's turn.

        chat([{"role": "user", "content": "Hi"}]) in ChatML:
        <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n

        The same as transformers' apply_chat_template, except that control tokens inside messages stay text:
        before rendering, a meaningless character goes after each of their letters, so that a control token
        in the rendered text is the template's. (Left out: a token that is spread over two messages, if a
        template puts nothing between them.)
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
        if hidden not in text:  # in one piece: in some tokenizers a token takes a space beside it
            self.bpe.encode_special_tokens = False
            try:
                return self.encode(text)
            finally:
                self.bpe.encode_special_tokens = True
        ids = []
        for i, piece in enumerate(re.split(f"{self.control}(?!{hidden})", text)):  # text, token, text, ...
            if i % 2:
                ids += self._known([self.bpe.token_to_id(piece)])
            else:
                ids += self.encode(piece.replace(hidden, ""))
        return ids
