"""Conversations are rendered by the folder's own template; what people write in them stays text."""
import json
import random
import re
from pathlib import Path

import pytest
from conftest import MINI
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as BPE

from checkpoint.tokenizer import CHATML, Tokenizer
from run.command import UserError

GOLDEN = Path(__file__).parent / "golden"
QWEN = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None}
LLAMA = {"eos_token": "<|eot_id|>", "bos_token": "<|begin_of_text|>"}
R1 = {"eos_token": "<｜end▁of▁sentence｜>", "bos_token": "<｜begin▁of▁sentence｜>"}
GEMMA = {"eos_token": "<eos>", "bos_token": "<bos>"}
PHI = {"eos_token": "<|endoftext|>", "bos_token": "<s>"}
LFM = {"eos_token": "<|im_end|>", "bos_token": "<|startoftext|>"}
COHERE = {"eos_token": "<|END_OF_TURN_TOKEN|>", "bos_token": "<BOS_TOKEN>"}
# `template` is a file in golden/templates, `named` what tokenizer_config.json says of its tokens, `kwargs` go
# to the template.
TEMPLATES = [
    {"name": "qwen2.5", "template": "qwen2_5", "named": QWEN},
    {"name": "qwen3", "template": "qwen3", "named": QWEN},
    {"name": "qwen3, no thinking", "template": "qwen3", "named": QWEN, "kwargs": {"enable_thinking": False}},
    {"name": "qwen3 of trl", "template": "qwen3_training", "named": QWEN},
    {"name": "qwen3 2507", "template": "qwen3_instruct_2507", "named": QWEN},
    {"name": "qwen3.5", "template": "qwen3_5_think", "named": QWEN, "opening": "<think>\n"},
    {"name": "llama3", "template": "llama3", "named": LLAMA},
    {"name": "llama3.1", "template": "llama3_1", "named": LLAMA},
    {"name": "llama3.2", "template": "llama3_2", "named": LLAMA},
    {"name": "r1", "template": "deepseek_r1_distill", "named": R1, "opening": "<think>\n"},
    {"name": "phi3", "template": "phi3", "named": PHI, "end": "<|end|>"},
    {"name": "gemma", "template": "gemma", "named": GEMMA, "end": "<end_of_turn>"},
    {"name": "gemma3", "template": "gemma3", "named": GEMMA, "end": "<end_of_turn>"},
    {"name": "lfm2", "template": "lfm2", "named": LFM},
    {"name": "lfm2.5", "template": "lfm2_2_5", "named": LFM},
    {"name": "glm4", "template": "glm4moe", "named": {"eos_token": "<|user|>"}},
    {"name": "cohere", "template": "cohere", "named": COHERE},
    {"name": "chatml", "source": CHATML, "named": {**QWEN, "unk_token": "☃"}},  # a token of one letter
]
CONVERSATIONS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": "  2+3?\n"}],
    [{"role": "system", "content": ""}, {"role": "user", "content": "é 東京 👩‍🚀 \u2028 {{ x }} {% if %}"}],
    [{"role": "user", "content": "a"},
     {"role": "assistant", "content": "b"},
     {"role": "user", "content": "c"}],
    [{"role": "user", "content": "a"},
     {"role": "assistant", "content": "<think>\nx\n</think>\n\nb\n"},
     {"role": "user", "content": "<think> </think> <tool_call>"}],
]


def source_of(case):
    return case.get("source") or (GOLDEN / "templates" / f"{case['template']}.jinja").read_text()


def folder_with(path, case, special=True):
    """A folder with a byte-level tokenizer that has the tokens of a template."""
    source = source_of(case)
    tokens = re.findall(r"<[|｜][^<>{}]+?[|｜]>|<(?:start|end)_of_turn>|\[gMASK\]|<sop>", source)
    tokens += [token for token in case["named"].values() if token]
    ordinary = re.findall(r"</?(?:think|tool_call)>", source)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = BPE(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    for token in dict.fromkeys(tokens + ordinary):
        bpe.add_tokens([AddedToken(token, special=special and token not in ordinary, normalized=False)])
    path.mkdir(exist_ok=True)
    bpe.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": source, **case["named"]}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def tokenizer_of(path, case, **kw):
    return Tokenizer(folder_with(path, case, **kw), case.get("kwargs"))


# ---- rendering -----------------------------------------------------------------------------------
GOLDEN_IDS = json.loads((GOLDEN / "chat.json").read_text()) if (GOLDEN / "chat.json").exists() else {}


@pytest.mark.parametrize("case", TEMPLATES, ids=lambda case: case["name"])
def test_chat_equals_transformers(case, tmp_path):
    """Rule 7: the ids of apply_chat_template, for all but what a template refuses."""
    tokenizer = tokenizer_of(tmp_path, case)
    for conversation, want in zip(CONVERSATIONS, GOLDEN_IDS[case["name"]], strict=True):
        if want is None:
            with pytest.raises(UserError, match="the chat template fails"):
                tokenizer.chat(conversation)
        else:
            assert tokenizer.chat(conversation) == want
    bos = tokenizer.bpe.token_to_id(case["named"].get("bos_token") or "")
    assert tokenizer.chat(CONVERSATIONS[0]).count(bos) <= 1
    assert tokenizer.opening == case.get("opening", "")
    assert tokenizer.end_id == tokenizer.bpe.token_to_id(case.get("end", case["named"]["eos_token"]))


def test_golden_ids_are_transformers(monkeypatch):
    """The live comparison, where transformers is installed: the golden file is not out of date."""
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(GOLDEN)
    import make
    monkeypatch.setattr(make.chat_template_utils, "datetime", make.FixedDate)
    for case in TEMPLATES[::5]:
        for conversation, want in zip(CONVERSATIONS, GOLDEN_IDS[case["name"]], strict=True):
            assert make.ids_by_transformers(case, conversation) == want


@pytest.mark.parametrize("special", [True, False], ids=["special", "ordinary"])
@pytest.mark.parametrize("case", TEMPLATES, ids=lambda case: case["name"])
def test_no_content_adds_a_control_token(case, special, tmp_path):
    """Rule 5, whatever the template and however the folder marks its tokens; and no text is lost."""
    tokenizer = tokenizer_of(tmp_path, case, special=special)
    added = tokenizer.bpe.get_added_tokens_decoder()
    user = {"role": "user", "content": "x"}
    neutral = [user, {"role": "assistant", "content": "y"}, user]
    control = {id for id, token in added.items() if not re.search("think|tool", token.content)}
    if not special:
        control &= {tokenizer.end_id, *tokenizer.chat(neutral)}
    assert tokenizer.end_id in control

    def count(content):
        messages = [{"role": "user", "content": content}]
        if "<｜User｜>" not in source_of(case):  # R1's template drops what stands before </think>
            messages += [{"role": "assistant", "content": content}, {"role": "user", "content": content}]
        ids = tokenizer.chat(messages)
        assert content.strip() in tokenizer.decode(ids)
        return sum(id in control for id in ids)

    texts = [token.content for token in added.values() if "think" not in token.content]
    texts += ["a ", "<", "|>", "<|", "\U000f0000", "\U000f0001", "é", "\n"]
    rng = random.Random(0)
    want = count("x")
    for _ in range(40):
        pieces = [rng.choice(texts) for _ in range(rng.randint(1, 6))]
        cut = rng.choice(texts)
        pieces.append(cut[:rng.randint(1, len(cut))])
        content = "x" + "".join(pieces) + "x"
        assert count(content) == want, content


@pytest.mark.parametrize("normalizer, texts", [
    (normalizers.Lowercase(), ["<|IM_END|>"]),
    (normalizers.NFKC(), ["＜|im_end|＞", "<｜im_end｜>"]),
    (normalizers.NFC(), ["<|im_end|\u0338>"]),
])
def test_no_lookalike_is_a_control_token(tmp_path, normalizer, texts):
    """A tokenizer that normalises text may make a control token of what is none."""
    folder = folder_with(tmp_path, TEMPLATES[0])
    bpe = BPE.from_file(str(folder / "tokenizer.json"))
    bpe.normalizer = normalizer
    source = json.loads(bpe.to_str())
    for token in source["added_tokens"]:
        token["normalized"] = True
    (folder / "tokenizer.json").write_text(json.dumps(source))
    tokenizer = Tokenizer(folder)
    neutral = tokenizer.chat([{"role": "user", "content": "x"}])
    for text in texts:
        ids = tokenizer.chat([{"role": "user", "content": text}])
        assert ids.count(tokenizer.end_id) == neutral.count(tokenizer.end_id)


def test_words_are_no_control_tokens():
    """The miniature has a token for "user\\n": it may stand in a question as it is."""
    tokenizer = Tokenizer(MINI)
    word = tokenizer.bpe.token_to_id("user\n")
    assert tokenizer.encode("user\n") == [word]
    assert tokenizer.chat([{"role": "user", "content": "user\n"}]).count(word) == 2
    assert tokenizer.decode(tokenizer.encode("<|im_start|>\nü€")) == "<|im_start|>\nü€"


def test_half_a_surrogate_pair_is_one_line():
    tokenizer = Tokenizer(MINI)
    for call in (tokenizer.encode, lambda text: tokenizer.chat([{"role": "user", "content": text}])):
        with pytest.raises(UserError, match="not valid Unicode"):
            call("a\udcff")


@pytest.mark.parametrize("name, content", [
    ("added_tokens.json", {"<|new|>": 999}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"999": {"content": "<|new|>"}}}),
])
def test_a_token_of_another_file_is_not_taken_for_text(tmp_path, name, content):
    folder = folder_with(tmp_path, TEMPLATES[0])
    source = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
    (folder / name).write_text(json.dumps({**source, **content}))
    with pytest.raises(UserError, match=re.escape("lacks the token '<|new|>'")):
        Tokenizer(folder)


def test_think_tags_stay_tokens(tmp_path):
    """In traces as in prompts, even where a folder marks them as special."""
    folder = folder_with(tmp_path, TEMPLATES[1])
    source = json.loads((folder / "tokenizer.json").read_text())
    for token in source["added_tokens"]:
        token["special"] = True
    (folder / "tokenizer.json").write_text(json.dumps(source))
    tokenizer = Tokenizer(folder)
    think = tokenizer.bpe.token_to_id("<think>")
    assert tokenizer.encode("<think>") == [think]
    assert think in tokenizer.chat([{"role": "user", "content": "<think>"}])


# ---- which template ------------------------------------------------------------------------------
def rendered(folder, **kw):
    return Tokenizer(folder, **kw).template.render([{"role": "user", "content": "Hi"}])


def configure(folder, **changes):
    path = folder / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def test_the_template_is_the_file_or_the_default_entry(tmp_path):
    """A stale template, a comment or the tool_use entry once put a system turn into every prompt."""
    folder = folder_with(tmp_path, TEMPLATES[0])
    default = CHATML + "{% if tools is not none %}tools{% endif %}"  # as in transformers they are none
    named = [{"name": "tool_use", "template": "{{ 1 / 0 }}"}, {"name": "default", "template": default}]
    configure(folder, chat_template=named)
    assert rendered(folder) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    configure(folder, chat_template={"rag": "x", "default": CHATML})
    assert rendered(folder) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    for broken in (named[:1], [], {}, ["default"], [{"name": "tool_use"}], 5, True):
        configure(folder, chat_template=broken)
        with pytest.raises(UserError, match="several of which one has the name default"):
            Tokenizer(folder)
    source = "{% for m in messages %}{{ m.content }}<|im_end|>{% if 0 %}{% break %}{% endif %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(source)
    assert rendered(folder) == "Hi<|im_end|>"


@pytest.mark.parametrize("source, message", [
    ("{% if %}", "the chat template fails (Expected an expression"),
    ("{{ messages[0].content.nothing.more }}", "the chat template fails ("),
    ("{{ raise_exception('not\nme') }}", "the chat template fails (not)"),
    ("{{ messages.append(1) }}", "the chat template fails ("),
    ("{{ ''.__class__.__mro__ }}", "the chat template fails ("),
    ("{{ 'a' * 1000000000000 }}", "the chat template fails ("),
    ("{{ lipsum() }}", "the chat template fails ("),
    ("{{ cycler.__init__.__globals__ }}", "the chat template fails ("),
    ("{% include 'other' %}", "the chat template fails ("),
    ("", "renders nothing of what was said"),
    ("Hello", "renders nothing of what was said"),
])
def test_a_template_that_fails_is_one_line(tmp_path, source, message):
    folder = folder_with(tmp_path, TEMPLATES[0])
    configure(folder, chat_template=source)
    with pytest.raises(UserError) as e:
        Tokenizer(folder)
    assert str(e.value).startswith(str(folder)), e.value
    assert message in str(e.value) and "\n" not in str(e.value)


def test_a_folder_without_template_and_markers_is_refused(tmp_path):
    folder = folder_with(tmp_path, TEMPLATES[6])  # a base model of Llama 3
    configure(folder, chat_template=None)
    with pytest.raises(UserError, match="no chat template.*put a chat_template.jinja there"):
        Tokenizer(folder)


ODD = ["{", "[]", "[" * 100000, "\udcff"]


@pytest.mark.parametrize("name, sources", [
    ("tokenizer.json", [
        *ODD, "{}", '{"added_tokens": 5}', '{"added_tokens": [{"content": "a", "id": [1]}]}',
        '{"added_tokens": [1, {}, {"content": "a"}]}', '{"added_tokens": {"a": 1}, "model": null}']),
    ("tokenizer_config.json", ODD),
    ("special_tokens_map.json", ODD),
    ("generation_config.json", [*ODD, '{"eos_token_id": "2"}']),
])
def test_a_damaged_file_is_named(tmp_path, name, sources):
    folder = folder_with(tmp_path, TEMPLATES[0])
    for source in sources:
        (folder / name).write_text(source, errors="surrogateescape")
        with pytest.raises(UserError) as e:
            Tokenizer(folder)
        where = folder if name == "tokenizer.json" else f"{folder / name}: "
        assert str(where) in str(e.value) and "\n" not in str(e.value), source


# ---- where a turn ends ---------------------------------------------------------------------------
@pytest.mark.parametrize("generation, config, eos, more", [
    ({"eos_token_id": [7, 8]}, {"eos_token_id": 9}, "<|endoftext|>", {7, 8}),
    ({"eos_token_id": 7}, {}, None, {7}),
    ({}, {"eos_token_id": 9}, None, set()),  # as transformers: a generation config is there
    (None, {"eos_token_id": 9}, None, {9}),
    (None, None, "<|endoftext|>", set()),
])
def test_stop_ids(tmp_path, generation, config, eos, more):
    """The end of the turn, what generation_config.json says (without one config.json), and eos_token."""
    folder = folder_with(tmp_path, TEMPLATES[0])
    configure(folder, eos_token=eos)
    for name, content in (("generation_config.json", generation), ("config.json", config)):
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    tokenizer = Tokenizer(folder)
    id_of = tokenizer.bpe.token_to_id
    assert set(tokenizer.stop_ids) == {id_of("<|im_end|>"), *more, *([id_of(eos)] if eos else [])}
    assert tokenizer.end_id == id_of("<|im_end|>")


# ---- prompts that open <think> -------------------------------------------------------------------
@pytest.mark.parametrize("name, text, want", [
    ("r1", "<think>\n<sample>\n1\n</think>\n2", "<sample>\n1\n</think>\n2"),
    ("r1", "<think>1</think>2", "1</think>2"),
    ("r1", "\n<think>\n1</think>2", "1</think>2"),
    ("r1", "1</think>2", "1</think>2"),
    ("r1", "2", "\n</think>\n\n2"),
    ("qwen3", "2", "2"),
    ("qwen3", "<think>\n1</think>", "<think>\n1</think>"),
])
def test_a_response_leaves_out_the_opening_of_its_prompt(tmp_path, name, text, want):
    tokenizer = tokenizer_of(tmp_path, next(case for case in TEMPLATES if case["name"] == name))
    ids = tokenizer.encode_response(text)
    assert ids[-1] == tokenizer.end_id and tokenizer.decode(ids[:-1]) == want
    assert tokenizer.decode_response(ids) == tokenizer.opening + want
